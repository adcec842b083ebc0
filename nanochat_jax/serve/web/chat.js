// The chat page: draws the conversations, streams replies, handles the page's events.

import { MAX_MESSAGE_CHARS, complete, health } from "./api.js";
import { $, button, element, icon } from "./dom.js";
import { choose, command as runCommand, sampling, setUp, settings, showModel } from "./settings.js";
import * as store from "./store.js";
import { drawText, drawTurn, plainText } from "./turns.js";

const SUGGESTIONS = [
  "Why is the sky blue?",
  "What is 345 + 678?",
  "How many r are in strawberry?",
  "Write a short poem.",
];
const STORAGE_FULL =
  "The browser's storage is full. Delete old conversations, " +
  "or this one is lost when you close the page.";
const [scroll, log, welcome, input] = ["scroll", "log", "welcome", "input"].map($);
const narrow = matchMedia("(max-width: 860px)"); // the sidebar covers the page

let chats = store.loadConversations();
let chat = store.newConversation(); // on screen; in `chats` once it has a message
const requests = new Map(); // conversation id to the AbortController of its reply
let editing = null; // index of the message being edited in the composer
let unsent = ""; // the composer's text before that edit

// ---- drawing

function draw() {
  const focused = document.activeElement;
  welcome.hidden = chat.turns.length > 0;
  const lastReply = chat.turns.findLastIndex((turn) => turn.role === "assistant");
  log.replaceChildren(
    ...chat.turns.map((turn, index) =>
      drawTurn(turn, {
        edited: index === editing,
        later: editing !== null && index > editing,
        edit: () => edit(index),
        regenerate: index === lastReply ? () => regenerate(index) : null,
      }),
    ),
  );
  drawComposer();
  drawSidebar();
  if (!focused.checkVisibility()) input.focus(); // its button was replaced
}

function drawComposer() {
  const streaming = requests.has(chat.id);
  $("send").hidden = streaming;
  $("stop").hidden = !streaming;
  const length = [...input.value.trim()].length; // code points, as the server counts
  $("send").disabled = length === 0 || length > MAX_MESSAGE_CHARS;
  $("too-long").hidden = length <= MAX_MESSAGE_CHARS;
  $("too-long").textContent =
    `The message has ${length} characters. The limit is ${MAX_MESSAGE_CHARS}.`;
  $("editing").hidden = editing === null;
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
}

function drawSidebar() {
  const focused = document.activeElement.id;
  const rows = chats.map((item) => {
    const open = button(item.title, () => show(item));
    open.title = item.title;
    open.id = `open-${item.id}`;
    if (item.id === chat.id) open.setAttribute("aria-current", "true");
    const remove = element("button.round", icon("remove"));
    remove.type = "button";
    remove.title = "Delete this conversation";
    remove.ariaLabel = `Delete this conversation: ${item.title}`;
    remove.id = `delete-${item.id}`;
    remove.addEventListener("click", () => confirm(`Delete "${item.title}"?`) && forget(item));
    return element("li", open, remove);
  });
  $("conversations").replaceChildren(
    ...(rows.length ? rows : [element("li.none", "No conversations.")]),
  );
  $(focused)?.focus();
  document.title = chat.title ? `${chat.title} · NanoChat` : "NanoChat";
}

function showSidebar(open) {
  document.body.dataset.sidebar = open ? "open" : "closed";
  $("toggle-sidebar").ariaExpanded = String(open);
  $("page").inert = open && narrow.matches;
  if ($("page").inert) $("close-sidebar").focus();
}

function closeSidebar() {
  showSidebar(false);
  $("toggle-sidebar").focus();
}

// ---- scrolling: the page stays at the newest message while the reader is there

let following = true;

const isAtBottom = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 60;

function follow(is) {
  following = is;
  $("to-bottom").hidden = is;
}

function toBottom() {
  scroll.scrollTop = scroll.scrollHeight;
  follow(true); // there is no scroll event if nothing can scroll
}

function keepBottom(change) {
  const stay = isAtBottom();
  change();
  if (stay || isAtBottom()) toBottom();
}

// ---- conversations

function save(conversation) {
  conversation.updated = Date.now();
  const saved = store.save(conversation);
  if (conversation.turns.some((turn) => turn.role === "user")) {
    chats = [conversation, ...chats.filter((item) => item.id !== conversation.id)];
    if (conversation === chat) history.replaceState(null, "", `#${chat.id}`); // for a reload
  }
  if (!saved && !conversation.turns.some((turn) => turn.text === STORAGE_FULL)) {
    conversation.turns.push({ role: "note", text: STORAGE_FULL });
  }
}

function show(conversation) {
  endEdit();
  chat = conversation;
  history.replaceState(null, "", chat.turns.length ? `#${chat.id}` : location.pathname);
  if (narrow.matches) showSidebar(false);
  draw();
  toBottom();
  input.focus();
}

function newConversation() {
  show(store.newConversation());
}

function forget(conversation) {
  requests.get(conversation.id)?.abort();
  store.remove(conversation);
  chats = chats.filter((item) => item !== conversation);
  if (conversation === chat) return newConversation();
  drawSidebar();
  ($("page").inert ? $("close-sidebar") : input).focus();
}

// Another tab changed the conversations. Those with a reply in progress here stay as they are.
function takeChanges() {
  const here = chats.filter((item) => requests.has(item.id));
  chats = [...here, ...store.loadConversations().filter((item) => !requests.has(item.id))];
  const changed = chats.find((item) => item.id === chat.id);
  if (!changed && chat.turns.length) return drawSidebar(); // deleted there, still on screen here
  if (changed && editing === null) chat = changed;
  keepBottom(draw);
}

// ---- messages

function submit() {
  const text = input.value.trim();
  drawComposer();
  if ($("send").disabled || requests.has(chat.id)) return;
  const from = editing ?? chat.turns.length;
  input.value = "";
  endEdit();
  const slash = text.match(/^\/([a-z]+)(?:\s+(\S+))?$/i);
  if (!slash) return ask(text, from);
  const word = slash[1].toLowerCase();
  if (word === "clear") return newConversation();
  chat.turns.push({ role: "note", text: runCommand(word, slash[2]) });
  draw();
  toBottom();
}

function ask(text, from = chat.turns.length) {
  chat.turns.length = from;
  chat.turns.push({ role: "user", text });
  reply();
}

function edit(index) {
  if (requests.has(chat.id)) return;
  if (editing === null) unsent = input.value;
  editing = index;
  input.value = chat.turns[index].text;
  draw();
  input.focus();
}

function endEdit() {
  if (editing !== null) input.value = unsent;
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
  const own = chat; // the user may open another conversation before the reply ends
  const question = own.turns.slice();
  const turn = { role: "assistant", parts: [], state: "streaming" };
  const controller = new AbortController();
  own.turns.push(turn);
  requests.set(own.id, controller);
  save(own);
  draw();
  toBottom();
  $("status").textContent = "nanochat is writing";
  const began = performance.now();
  let [pieces, saved] = [0, began];
  try {
    for await (const event of complete(question, sampling(), controller.signal)) {
      if ("dropped" in event) {
        turn.dropped = event.dropped;
        continue;
      }
      pieces++;
      append(turn, event);
      const now = performance.now();
      if (now - saved > 1000) {
        // closing the page loses a second at most
        saved = now;
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
  if (chats.includes(own)) save(own); // unless it was deleted
  if (own !== chat) return drawSidebar();
  keepBottom(draw);
  $("status").textContent =
    turn.state === "failed" ? "" : `nanochat said: ${plainText(turn.parts)}`;
}

function append(turn, event) {
  const last = turn.parts.at(-1);
  if (event.tool) turn.parts.push({ type: "tool", ...event.tool });
  else if (last?.type === "text") last.text += event.token;
  else turn.parts.push({ type: "text", text: event.token });
  drawSoon();
}

let frame = null;
let restUntil = 0;

// Draws the reply in progress once per frame, and spends at most half of the time on it.
function drawSoon() {
  frame ??= requestAnimationFrame((now) => {
    frame = null;
    if (now < restUntil) return drawSoon();
    const turn = chat.turns.findLast(({ state }) => state === "streaming");
    if (turn) keepBottom(() => drawText(turn));
    restUntil = 2 * performance.now() - now;
  });
}

// ---- the server

let watching = false;

// Polls /health until the server responds. A banner is shown while it does not.
async function watchServer() {
  if (watching) return;
  watching = true;
  for (;;) {
    try {
      showModel(await health());
      break;
    } catch {
      $("offline").hidden = false;
      await new Promise((resolve) => {
        setTimeout(resolve, 2000);
      });
    }
  }
  watching = false;
  $("offline").hidden = true;
}

// ---- events

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
input.addEventListener("input", drawComposer);
input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
document.addEventListener("keydown", (event) => {
  if ($("settings").open) return;
  if (event.ctrlKey && event.shiftKey && event.key.toLowerCase() === "o") {
    event.preventDefault();
    newConversation();
  } else if (event.key === "Escape") {
    if ($("page").inert) closeSidebar();
    else if (requests.has(chat.id)) requests.get(chat.id).abort();
    else if (editing !== null) cancelEdit();
  }
});
let height = 0; // scrolling because the area became smaller is not the reader's
scroll.addEventListener("scroll", () => {
  if (scroll.clientHeight === height) follow(isAtBottom());
});
new ResizeObserver(() => {
  height = scroll.clientHeight;
  if (following) toBottom();
}).observe(scroll);
$("to-bottom").addEventListener("click", toBottom);
$("new").addEventListener("click", newConversation);
$("stop").addEventListener("click", () => requests.get(chat.id)?.abort());
$("cancel-edit").addEventListener("click", cancelEdit);
for (const id of ["shade", "close-sidebar"]) $(id).addEventListener("click", closeSidebar);
$("toggle-sidebar").addEventListener("click", () => {
  const open = document.body.dataset.sidebar !== "open";
  showSidebar(open);
  if (!narrow.matches) choose("sidebar", open);
});
narrow.addEventListener("change", () => showSidebar(!narrow.matches && settings.sidebar !== false));
for (const text of SUGGESTIONS) $("suggestions").append(button(text, () => ask(text)));

setUp(() => {
  for (const item of chats) forget(item);
});
showSidebar(!narrow.matches && settings.sidebar !== false);
store.onChange(takeChanges);
show(chats.find((item) => `#${item.id}` === location.hash) ?? chat);
watchServer();
