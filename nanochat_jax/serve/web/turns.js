// Draws one turn of a conversation:
//   {role: "user", text} | {role: "note", text}, the page's own words
//   | {role: "assistant", parts, error, dropped, speed,
//      state: "streaming" | "done" | "stopped" | "failed"}

import { button, copyButton, element } from "./dom.js";
import { render } from "./markdown.js";

const replies = new WeakMap(); // turn to its .reply element, which is moved and not drawn again

// edit, regenerate: called by the buttons; without `regenerate` there is no such button.
export function drawTurn(turn, { edited, later, edit, regenerate }) {
  const node = element("div.message");
  node.classList.toggle("later", later);
  if (turn.role === "user") {
    const bubble = element("div.user", turn.text);
    bubble.classList.toggle("edited", edited);
    const row = element(
      "div.controls.right",
      button("Edit", edit, "edit"),
      copyButton(() => turn.text),
    );
    node.append(element("h3.hidden", "You said"), bubble, row);
  } else if (turn.role === "assistant") {
    node.append(element("h3.hidden", "nanochat said"), ...drawReply(turn, regenerate));
  } else {
    const note = element("div.note.reply");
    render(note, [{ type: "text", text: turn.text }]);
    node.append(note);
  }
  return node;
}

// The element that shows the text of a reply. Call it again when the turn has grown.
export function drawText(turn) {
  const reply = replies.get(turn) ?? element("div.reply");
  replies.set(turn, reply);
  render(reply, turn.parts);
  reply.classList.toggle("streaming", turn.state === "streaming");
  return reply;
}

function drawReply(turn, regenerate) {
  const nodes = [drawText(turn)];
  if (turn.dropped) {
    nodes.unshift(
      element("p.ended", `The first ${turn.dropped} messages no longer fit in the context.`),
    );
  }
  if (turn.state === "streaming") return nodes;
  if (turn.state === "failed") {
    const again = regenerate ? [" ", button("Try again", regenerate)] : [];
    const error = element("div.error", turn.error, ...again);
    error.role = "alert";
    return [...nodes, error];
  }
  if (turn.state === "stopped") nodes.push(element("p.ended", "Stopped."));
  else if (!turn.parts.length) nodes.push(element("p.ended", "The model returned an empty reply."));
  const row = element(
    "div.controls",
    ...(turn.parts.length ? [copyButton(() => plainText(turn.parts))] : []),
  );
  if (regenerate) row.prepend(button("Regenerate", regenerate, "again"));
  if (turn.speed)
    row.append(element("span.speed", `${turn.speed.toFixed(turn.speed < 10 ? 1 : 0)} tokens/s`));
  return [...nodes, row];
}

export function plainText(parts) {
  const plain = (part) =>
    part.type === "text" ? part.text : `${part.expression} = ${part.output ?? "no result"} `;
  return parts.map(plain).join("").trimEnd();
}
