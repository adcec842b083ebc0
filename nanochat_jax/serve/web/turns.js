// How a turn looks.
//   {role: "user", text} | {role: "note", text}
//   | {role: "assistant", parts, state: "streaming" | "done" | "stopped" | "failed", error, dropped, speed}

import { button, copyButton, element } from "./dom.js";
import { render } from "./markdown.js";

// edit, regenerate: what the buttons do; regenerate is null where it is not offered.
export function drawTurn(turn, { edited, later, edit, regenerate }) {
  const node = element("div.message");
  node.classList.toggle("later", later);
  if (turn.role === "user") {
    const bubble = element("div.user", turn.text);
    bubble.classList.toggle("edited", edited);
    const row = element("div.controls.right", button("Edit", edit, "edit"), copyButton(() => turn.text));
    node.append(element("h3.hidden", "You said"), bubble, row);
  } else if (turn.role === "assistant") {
    node.append(element("h3.hidden", "nanochat said"), ...drawReply(turn, regenerate));
  } else {
    node.append(element("div.note", ...turn.text.split("\n").map((line) => element("div", line || "\u200b"))));
  }
  return node;
}

function drawReply(turn, regenerate) {
  const reply = element("div.reply", render(turn.parts));
  const nodes = [reply];
  if (turn.dropped) {
    nodes.unshift(element("p.ended", `The first ${turn.dropped} messages no longer fit in the model's memory.`));
  }
  if (turn.state === "streaming") {
    reply.append(turn.parts.length ? element("span.caret") : dots());
    return nodes;
  }
  if (turn.state === "failed") {
    const again = regenerate ? [" ", button("Try again", regenerate)] : [];
    nodes.push(element("div.error", turn.error, ...again));
    nodes.at(-1).setAttribute("role", "alert");
    return nodes;
  }
  if (turn.state === "stopped") nodes.push(element("p.ended", "Stopped."));
  else if (!turn.parts.length) nodes.push(element("p.ended", "The model had nothing to say."));
  const row = element("div.controls", ...(turn.parts.length ? [copyButton(() => plainText(turn.parts))] : []));
  if (regenerate) row.prepend(button("Regenerate", regenerate, "again"));
  if (turn.speed) row.append(element("span.speed", `${turn.speed.toFixed(turn.speed < 10 ? 1 : 0)} tokens/s`));
  nodes.push(row);
  return nodes;
}

function dots() {
  const node = element("span.dots", element("i"), element("i"), element("i"));
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", "writing");
  return node;
}

export function plainText(parts) {
  const plain = (part) => (part.type === "text" ? part.text : `${part.expression} = ${part.output ?? "no result"} `);
  return parts.map(plain).join("").trimEnd();
}
