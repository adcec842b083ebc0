// Saves settings and conversations in the browser (localStorage), each conversation under its own
// key: {id, title, updated, turns}. turns.js describes a turn. Notes are not saved.

const CHAT = "nanochat.chat.";
const SETTINGS = "nanochat.settings";

const read = (key) => {
  try {
    return JSON.parse(localStorage.getItem(key));
  } catch {
    // no storage, or not JSON
    return null;
  }
};

function write(key, value) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
    return true;
  } catch {
    // no storage, or full
    return false;
  }
}

export const readSettings = () => ({ ...read(SETTINGS) });
export const writeSettings = (settings) => write(SETTINGS, settings);

export function newConversation() {
  const id = Array.from(crypto.getRandomValues(new Uint8Array(9)), (byte) =>
    byte.toString(36),
  ).join("");
  return { id, title: "", updated: 0, turns: [] };
}

// All valid conversations, newest first.
export function loadConversations() {
  const chats = [];
  try {
    for (let at = 0; at < localStorage.length; at++) {
      const key = localStorage.key(at);
      const chat = key.startsWith(CHAT) ? read(key) : null;
      if (chat && key === CHAT + chat.id && isChat(chat)) chats.push(chat);
    }
  } catch {
    /* no storage */
  }
  for (const { turns } of chats) {
    // the page was closed during a reply
    for (const turn of turns) if (turn.state === "streaming") turn.state = "stopped";
  }
  return chats.sort((one, other) => other.updated - one.updated);
}

function isChat({ title, turns }) {
  return (
    typeof title === "string" &&
    Array.isArray(turns) &&
    turns[0]?.role === "user" &&
    turns.every(isTurn)
  );
}

function isTurn(turn) {
  if (turn?.role === "user") return typeof turn.text === "string";
  const isPart = (part) =>
    typeof (part?.type === "text" ? part.text : part?.expression) === "string";
  return turn?.role === "assistant" && Array.isArray(turn.parts) && turn.parts.every(isPart);
}

// Returns false if the browser refused.
export function save(chat) {
  const turns = chat.turns.filter((turn) => turn.role !== "note");
  if (!turns.length) return true;
  chat.title = turns[0].text.replace(/\s+/g, " ").slice(0, 80);
  return write(CHAT + chat.id, { ...chat, turns });
}

export function remove(chat) {
  try {
    localStorage.removeItem(CHAT + chat.id);
  } catch {
    /* it was never saved */
  }
}

// Calls `act` when another tab changed a conversation.
export function onChange(act) {
  addEventListener("storage", (event) => {
    if (event.key === null || event.key.startsWith(CHAT)) act();
  });
}
