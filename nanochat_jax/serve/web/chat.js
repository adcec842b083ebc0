// The page's state is one list of turns; everything on screen is drawn from it.
//   {role: "user", text} | {role: "note", text}
//   | {role: "assistant", parts, state: "streaming" | "done" | "stopped" | "failed", error, dropped}

import { element, icon, render } from "./markdown.js";

const SUGGESTIONS = [
  "Why is the sky blue?", "What is 345 + 678?", "How many r are in strawberry?", "Write a short poem.",
];
const HELP = `/temperature [0 to 2]   show or set how freely it draws its words
/topk [0 to 200]        show or set among how many tokens it draws, 0 is all
/clear                  new conversation, as Ctrl+Shift+N
/help                   this list`;
const SETTINGS = {
  temperature: { name: "temperature", valid: (value) => value >= 0 && value <= 2, range: "from 0 to 2" },
  topk: {
    name: "top_k",
    valid: (value) => Number.isInteger(value) && value >= 0 && value <= 200,
    range: "a whole number from 0 to 200",
  },
};
const ICONS = {
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  again: "M20 11a8 8 0 1 0-2.3 6.3M20 4v7h-7",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
};

const $ = (id) => document.getElementById(id);
const [scroll, log, welcome, input] = ["scroll", "log", "welcome", "input"].map($);

let turns = [];
let settings = {}; // what the user set by command; all else is the server's default
let defaults = {};
let editing = null; // index of the user turn in the composer
let request = null; // AbortController of the reply being streamed

// ---- drawing

function draw() {
  welcome.hidden = turns.length > 0;
  log.replaceChildren(...turns.map(drawTurn));
  drawComposer();
}

function drawTurn(turn, index) {
  const node = element("div");
  node.className = "message" + (editing !== null && index > editing ? " later" : "");
  if (turn.role === "user") {
    const bubble = element("div", turn.text);
    bubble.className = "user" + (index === editing ? " edited" : "");
    bubble.addEventListener("click", () => getSelection().isCollapsed && edit(index));
    node.append(element("h3", "You said"), bubble, controls("right", ["edit", "Edit", () => edit(index)]));
    node.firstChild.className = "hidden";
  } else if (turn.role === "assistant") {
    node.append(element("h3", "nanochat said"), ...drawReply(turn, index));
    node.firstChild.className = "hidden";
  } else {
    node.append(element("div", turn.text));
    node.firstChild.className = "note";
  }
  return node;
}

function drawReply(turn, index) {
  const reply = element("div", render(turn.parts));
  reply.className = "reply";
  const nodes = [reply];
  if (turn.dropped) {
    nodes.unshift(element("p", `The first ${turn.dropped} messages no longer fit in the model's memory.`));
    nodes[0].className = "ended";
  }
  if (turn.state === "streaming") {
    if (!turn.parts.length) reply.append(dots());
    return nodes;
  }
  if (turn.state === "failed") {
    const again = element("button", "Try again");
    again.type = "button";
    again.addEventListener("click", () => regenerate(index));
    nodes.push(element("div", turn.error, " ", again));
    nodes.at(-1).className = "error";
    nodes.at(-1).setAttribute("role", "alert");
    return nodes;
  }
  if (turn.state === "stopped" || !turn.parts.length) {
    nodes.push(element("p", turn.state === "stopped" ? "Stopped." : "The model had nothing to say."));
    nodes.at(-1).className = "ended";
  }
  const buttons = [["again", "Regenerate", () => regenerate(index)]];
  if (navigator.clipboard) buttons.push(["copy", "Copy", (event) => copy(turn, event.target)]); // not on plain http
  nodes.push(controls("", ...buttons));
  return nodes;
}

function controls(side, ...buttons) {
  const row = element("div");
  row.className = `controls ${side}`;
  for (const [name, label, act] of buttons) {
    const button = element("button", icon(ICONS[name]), element("span", label));
    button.type = "button";
    button.addEventListener("click", act);
    row.append(button);
  }
  return row;
}

async function copy(turn, target) {
  await navigator.clipboard.writeText(plainText(turn.parts));
  const label = target.closest("button").querySelector("span");
  label.textContent = "Copied";
  setTimeout(() => { label.textContent = "Copy"; }, 1200);
}

function dots() {
  const node = element("span", element("i"), element("i"), element("i"));
  node.className = "dots";
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", "writing");
  return node;
}

function drawComposer() {
  $("send").hidden = request !== null;
  $("stop").hidden = request === null;
  $("send").disabled = !input.value.trim();
  $("editing").hidden = editing === null;
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

// Draw a change and stay at the bottom if the reader was there.
function keepBottom(change) {
  const stay = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;
  change();
  if (stay) toBottom();
}

function toBottom() {
  scroll.scrollTop = scroll.scrollHeight;
}

function plainText(parts) {
  const plain = (part) => (part.type === "text" ? part.text : `${part.expression} = ${part.output ?? "?"} `);
  return parts.map(plain).join("");
}

// ---- the conversation

function submit() {
  const text = input.value.trim();
  if (!text || request) return;
  input.value = "";
  if (command(text)) return;
  if (editing !== null) turns.length = editing;
  editing = null;
  turns.push({ role: "user", text });
  reply();
}

function note(text) {
  turns.push({ role: "note", text });
  draw();
  toBottom();
}

function command(text) {
  const match = text.match(/^\/([a-z]+)(?:\s+(\S+))?$/i);
  if (!match) return false;
  const [name, value] = [match[1].toLowerCase(), match[2]];
  if (name === "clear") {
    clear();
  } else if (name === "help") {
    note(HELP);
  } else if (name in SETTINGS) {
    const setting = SETTINGS[name];
    if (value !== undefined && !setting.valid(Number(value))) {
      note(`${name} must be ${setting.range}, not ${value}.`);
    } else {
      if (value !== undefined) settings[setting.name] = Number(value);
      const now = settings[setting.name] ?? defaults[setting.name] ?? "the server's default";
      note(`${name} is ${value === undefined ? "" : "now "}${now}.`);
    }
  } else {
    note(`There is no command /${name}; /help lists them.`);
  }
  return true;
}

function clear() {
  request?.abort();
  turns = [];
  editing = null;
  input.value = "";
  draw();
  input.focus();
}

function edit(index) {
  if (request) return;
  editing = index;
  input.value = turns[index].text;
  draw();
  input.focus();
}

function cancelEdit() {
  editing = null;
  input.value = "";
  draw();
  input.focus();
}

function regenerate(index) {
  if (request) return;
  turns.length = index;
  editing = null;
  reply();
}

// What the server is sent: questions with their answers, tool calls as parts. A question without an answer is left out.
function messages() {
  const chat = turns.filter((turn) => turn.role !== "note");
  return chat.flatMap((turn, index) => {
    const answered = index === chat.length - 1 || chat[index + 1].parts?.length;
    if (turn.role === "user") return answered ? [{ role: "user", content: turn.text }] : [];
    if (!turn.parts.length) return [];
    const content = turn.parts.flatMap((part) => {
      if (part.type === "text") return [part];
      const called = [{ type: "python", text: part.expression }];
      return part.output === null ? called : [...called, { type: "python_output", text: part.output }];
    });
    return [{ role: "assistant", content }];
  });
}

async function reply() {
  const body = JSON.stringify({ messages: messages(), ...settings });
  const turn = { role: "assistant", parts: [], state: "streaming" };
  const controller = new AbortController();
  turns.push(turn);
  request = controller;
  draw();
  toBottom();
  $("status").textContent = "nanochat is writing";
  try {
    const headers = { "Content-Type": "application/json" };
    const response = await fetch("/chat/completions", { method: "POST", headers, body, signal: controller.signal });
    if (!response.ok) {
      const answer = await response.json().catch(() => ({}));
      throw new Error(answer.detail ?? `The server answered ${response.status} ${response.statusText}.`);
    }
    turn.dropped = Number(response.headers.get("X-Dropped-Messages") ?? 0);
    let finished = false;
    for await (const event of events(response.body)) {
      if (event.error) throw new Error(event.error);
      if (event.done) finished = true;
      else take(turn, event);
    }
    if (!finished) throw new Error("The connection was lost before the reply ended.");
    turn.state = "done";
  } catch (error) {
    turn.state = controller.signal.aborted ? "stopped" : "failed";
    turn.error = error instanceof TypeError ? "The server cannot be reached." : error.message;
  }
  if (request === controller) request = null;
  if (!turns.includes(turn)) return drawComposer(); // cleared meanwhile
  keepBottom(draw);
  $("status").textContent = turn.state === "failed" ? "" : `nanochat said: ${plainText(turn.parts)}`;
}

// Objects of a stream of server-sent events.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let chunk = await reader.read(); !chunk.done; chunk = await reader.read()) {
    const blocks = (rest + chunk.value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) if (block.startsWith("data: ")) yield JSON.parse(block.slice(6));
  }
}

let frame = null;

function take(turn, event) {
  const last = turn.parts.at(-1);
  if (event.tool) turn.parts.push({ type: "tool", ...event.tool });
  else if (last?.type === "text") last.text += event.token;
  else turn.parts.push({ type: "text", text: event.token });
  frame ??= requestAnimationFrame(() => { // one drawing per frame, however many tokens
    frame = null;
    const index = turns.indexOf(turn);
    if (index >= 0) keepBottom(() => log.children[index].replaceWith(drawTurn(turn, index)));
  });
}

// ---- events of the page

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
input.addEventListener("input", drawComposer);
input.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
    drawComposer();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey && event.shiftKey && event.key.toLowerCase() === "n") {
    event.preventDefault();
    clear();
  } else if (event.key === "Escape") {
    if (request) request.abort();
    else if (editing !== null) cancelEdit();
  }
});
$("new").addEventListener("click", clear);
$("stop").addEventListener("click", () => request?.abort());
$("cancel-edit").addEventListener("click", cancelEdit);
for (const text of SUGGESTIONS) {
  const button = element("button", text);
  button.type = "button";
  button.addEventListener("click", () => {
    input.value = text;
    submit();
  });
  $("suggestions").append(button);
}

draw();
input.focus();
fetch("/health").then((response) => response.json()).then((health) => {
  defaults = health.defaults;
  $("model").textContent = health.model.name;
}).catch(() => note("The server cannot be reached. Is it still running?"));
