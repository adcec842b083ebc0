// The page: everything on screen is drawn from a list of conversations, each a list of turns (turns.js).

import { MAX_MESSAGE_CHARS, complete, health } from "./api.js";
import { $, button, element, icon } from "./dom.js";
import { choose, command as setByCommand, help, sampling, setUp, settings, showModel } from "./settings.js";
import * as store from "./store.js";
import { drawTurn, plainText } from "./turns.js";

const SUGGESTIONS = [
  "Why is the sky blue?", "What is 345 + 678?", "How many r are in strawberry?", "Write a short poem.",
];
const [scroll, log, welcome, input] = ["scroll", "log", "welcome", "input"].map($);
const narrow = matchMedia("(max-width: 860px)");

let chats = store.loadConversations();
let chat = store.newConversation(); // the one on screen; among `chats` once it has a message
const requests = new Map(); // conversation id to the AbortController of the reply being streamed
let editing = null; // index of the user turn in the composer
let aside = ""; // what was typed before that edit
const drafts = new Map(); // conversation id to what its composer held; "" is for a conversation not yet begun

// ---- drawing

function draw() {
  const focused = document.activeElement;
  welcome.hidden = chat.turns.length > 0;
  log.replaceChildren(...chat.turns.map((_, index) => turnNode(index)));
  drawComposer();
  if (!focused.checkVisibility()) input.focus(); // its button is gone
  drawSidebar();
}

function turnNode(index) {
  const isLast = !chat.turns.slice(index + 1).some((turn) => turn.role === "assistant");
  return drawTurn(chat.turns[index], {
    edited: index === editing,
    later: editing !== null && index > editing,
    edit: () => edit(index),
    regenerate: isLast ? () => regenerate(index) : null,
  });
}

function drawComposer() {
  const streaming = requests.has(chat.id);
  $("send").hidden = streaming;
  $("stop").hidden = !streaming;
  const length = [...input.value.trim()].length; // in characters, as the server counts
  $("send").disabled = length === 0 || length > MAX_MESSAGE_CHARS;
  $("too-long").hidden = length <= MAX_MESSAGE_CHARS;
  $("too-long").textContent = `${length} characters: a message has at most ${MAX_MESSAGE_CHARS}.`;
  $("editing").hidden = editing === null;
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function drawSidebar() {
  const focused = document.activeElement.id;
  const rows = chats.map((each) => {
    const open = button(each.title, () => show(each));
    open.title = each.title;
    open.id = `open-${each.id}`;
    if (each.id === chat.id) open.setAttribute("aria-current", "true");
    const remove = element("button.round", icon("remove"));
    remove.type = "button";
    remove.title = "Delete this conversation";
    remove.ariaLabel = `Delete this conversation: ${each.title}`;
    remove.id = `delete-${each.id}`;
    remove.addEventListener("click", () => forget(each));
    return element("li", open, remove);
  });
  $("conversations").replaceChildren(...rows.length ? rows : [element("li.none", "None yet.")]);
  $(focused)?.focus();
  document.title = chat.title ? `${chat.title} · NanoChat` : "NanoChat";
}

function showSidebar(open) {
  document.body.dataset.sidebar = open ? "open" : "closed";
  $("toggle-sidebar").ariaExpanded = String(open);
  $("page").inert = open && narrow.matches; // then the sidebar is a drawer over it
  if ($("page").inert) $("close-sidebar").focus();
}

function closeDrawer() {
  showSidebar(false);
  $("toggle-sidebar").focus();
}

const isAtBottom = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;

// The reader is at the bottom, and stays there when a banner or the keyboard takes room.
let following = true;

function follow(is) {
  following = is;
  $("to-bottom").hidden = is;
}

// Draw a change and stay at the bottom if the reader was there.
function keepBottom(change) {
  const stay = isAtBottom();
  change();
  if (stay || isAtBottom()) toBottom();
}

function toBottom() {
  scroll.scrollTop = scroll.scrollHeight;
  follow(true); // no scroll event tells of it where nothing can scroll
}

// ---- conversations

function keep(which) {
  which.updated = Date.now();
  const kept = store.save(which);
  if (which.turns.some((turn) => turn.role === "user")) {
    chats = [which, ...chats.filter((each) => each.id !== which.id)];
    if (which === chat) history.replaceState(null, "", `#${chat.id}`); // a reload comes back to it
  }
  const full = "This browser keeps no more: delete old conversations, or this one is gone when the page closes.";
  if (!kept && !which.turns.some((turn) => turn.text === full)) which.turns.push({ role: "note", text: full });
}

const draftKey = () => (chat.updated ? chat.id : "");

function show(which, close = true) {
  drafts.set(draftKey(), { text: input.value, editing, aside });
  chat = which;
  history.replaceState(null, "", chat.turns.length ? `#${chat.id}` : location.pathname);
  ({ text: input.value, editing, aside } = drafts.get(draftKey()) ?? { text: "", editing: null, aside: "" });
  drafts.delete(draftKey()); // the composer holds it now
  if (chat.turns[editing]?.role !== "user") editing = null; // another tab changed it
  if (close && narrow.matches) showSidebar(false);
  draw();
  toBottom();
  input.focus();
}

function forget(which) {
  requests.get(which.id)?.abort();
  store.remove(which);
  const next = chats[chats.indexOf(which) + 1] ?? chats.at(-2);
  chats = chats.filter((each) => each !== which);
  if (which === chat) show(store.newConversation(), false);
  else drawSidebar();
  offerUndo(which);
  [next && $(`open-${next.id}`), $("close-sidebar"), input].find((node) => node?.checkVisibility()).focus();
}

let undoTimer = null;

function offerUndo(which) {
  const undo = button("Undo", () => {
    $("toast").hidden = true;
    store.save(which);
    chats = [...chats, which].sort((one, other) => other.updated - one.updated);
    show(which);
  });
  $("toast").replaceChildren(element("span", "Conversation deleted."), undo);
  $("toast").hidden = false;
  clearTimeout(undoTimer);
  undoTimer = setTimeout(() => { $("toast").hidden = true; }, 8000);
}

function startAgain() {
  show(store.newConversation());
}

// Another tab wrote: take its conversations, but for those that are streamed here.
function takeChanges() {
  const here = chats.filter((each) => requests.has(each.id));
  chats = [...here, ...store.loadConversations().filter((each) => !requests.has(each.id))];
  const now = chats.find((each) => each.id === chat.id);
  if (now === undefined && chat.turns.length) return drawSidebar(); // deleted there; what is on screen stays
  if (now !== undefined && editing === null) chat = now;
  keepBottom(draw);
}

// ---- turns

function submit() {
  const text = input.value.trim();
  drawComposer();
  if ($("send").disabled || requests.has(chat.id)) return;
  const from = editing ?? chat.turns.length;
  input.value = "";
  endEdit();
  if (command(text)) return;
  ask(text, from);
}

function ask(text, from = chat.turns.length) {
  chat.turns.length = from;
  chat.turns.push({ role: "user", text });
  reply();
}

function note(text) {
  chat.turns.push({ role: "note", text });
  draw();
  toBottom();
}

function command(text) {
  const match = text.match(/^\/([a-z]+)(?:\s+(\S+))?$/i);
  if (!match) return false;
  const [word, value] = [match[1].toLowerCase(), match[2]];
  if (word === "clear") startAgain();
  else if (word === "help") note(help());
  else note(setByCommand(word, value) ?? `There is no command /${word}; /help lists them.`);
  return true;
}

function edit(index) {
  if (requests.has(chat.id)) return;
  if (editing === null) aside = input.value;
  editing = index;
  input.value = chat.turns[index].text;
  draw();
  input.focus();
}

function endEdit() {
  if (editing !== null) input.value = aside;
  editing = null;
}

function cancelEdit() {
  endEdit();
  draw();
  input.focus();
}

function regenerate(index) {
  if (requests.has(chat.id)) return;
  chat.turns.length = index;
  endEdit();
  reply();
}

async function reply() {
  const own = chat; // the user may go to another conversation meanwhile
  const asked = own.turns.slice();
  const turn = { role: "assistant", parts: [], state: "streaming" };
  const controller = new AbortController();
  own.turns.push(turn);
  requests.set(own.id, controller);
  keep(own);
  draw();
  toBottom();
  $("status").textContent = "nanochat is writing";
  const began = performance.now();
  let [pieces, kept] = [0, began];
  try {
    for await (const event of complete(asked, sampling(), controller.signal)) {
      if ("dropped" in event) {
        turn.dropped = event.dropped;
        continue;
      }
      pieces++;
      take(own, turn, event);
      const now = performance.now();
      if (now - kept > 1000) { // a page that is closed loses a second at most
        kept = now;
        store.save(own);
      }
    }
    turn.state = "done";
  } catch (error) {
    turn.state = controller.signal.aborted ? "stopped" : "failed";
    turn.error = error.message;
    if (error.status === 0) watchServer();
  }
  if (pieces > 4) turn.speed = (1000 * pieces) / (performance.now() - began);
  requests.delete(own.id);
  if (chats.includes(own)) keep(own); // else deleted meanwhile
  if (own !== chat) return drawSidebar();
  keepBottom(draw);
  $("status").textContent = turn.state === "failed" ? "" : `nanochat said: ${plainText(turn.parts)}`;
}

let frame = null;

function take(own, turn, event) {
  const last = turn.parts.at(-1);
  if (event.tool) turn.parts.push({ type: "tool", ...event.tool });
  else if (last?.type === "text") last.text += event.token;
  else turn.parts.push({ type: "text", text: event.token });
  if (own !== chat) return;
  frame ??= requestAnimationFrame(() => { // one drawing per frame, however many tokens
    frame = null;
    const index = chat.turns.indexOf(turn);
    if (index >= 0) keepBottom(() => log.children[index].replaceWith(turnNode(index)));
  });
}

// ---- the server

let watching = false;

// Ask the server how it is until it answers; the page says so while it does not.
async function watchServer() {
  if (watching) return;
  watching = true;
  for (;;) {
    try {
      showModel(await health());
      break;
    } catch {
      $("gone").hidden = false;
      await new Promise((resolve) => { setTimeout(resolve, 2000); });
    }
  }
  watching = false;
  $("gone").hidden = true;
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
  } else if (event.key === "ArrowUp" && !input.value && editing === null) {
    const index = chat.turns.findLastIndex((turn) => turn.role === "user");
    if (index < 0) return;
    event.preventDefault();
    edit(index);
  }
});
document.addEventListener("keydown", (event) => {
  if ($("settings").open) return;
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName);
  if (event.ctrlKey && event.shiftKey && ["n", "o"].includes(event.key.toLowerCase())) {
    event.preventDefault();
    startAgain();
  } else if (event.key === "/" && !typing) {
    event.preventDefault();
    input.focus();
  } else if (event.key === "Escape") {
    if ($("page").inert) closeDrawer();
    else if (requests.has(chat.id)) requests.get(chat.id).abort();
    else if (editing !== null) cancelEdit();
  }
});
let height = 0; // what the observer last saw: a scroll event may tell of taken room before it
scroll.addEventListener("scroll", () => {
  if (scroll.clientHeight === height) follow(isAtBottom());
});
new ResizeObserver(() => {
  height = scroll.clientHeight;
  if (following) toBottom();
}).observe(scroll);
$("to-bottom").addEventListener("click", toBottom);
$("new").addEventListener("click", startAgain);
$("stop").addEventListener("click", () => requests.get(chat.id)?.abort());
$("cancel-edit").addEventListener("click", cancelEdit);
for (const id of ["shade", "close-sidebar"]) $(id).addEventListener("click", closeDrawer);
$("toggle-sidebar").addEventListener("click", () => {
  const open = document.body.dataset.sidebar !== "open";
  showSidebar(open);
  if (!narrow.matches) choose("sidebar", open);
});
narrow.addEventListener("change", () => showSidebar(!narrow.matches && settings.sidebar !== false));
for (const text of SUGGESTIONS) {
  $("suggestions").append(button(text, () => ask(text)));
}

setUp(() => {
  for (const each of chats) forget(each);
  $("toast").hidden = true; // this was asked twice already
});
showSidebar(!narrow.matches && settings.sidebar !== false);
store.onChange(takeChanges);
show(chats.find((each) => `#${each.id}` === location.hash) ?? chat);
watchServer();
