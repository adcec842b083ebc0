// Calls the server.

export const MAX_MESSAGE_CHARS = 8000; // of the user's message
const MAX_CHARS = 32000; // of a request's messages; this and the next two are the server's limits
const MAX_MESSAGES = 500;
const MAX_PARTS = 1000; // of one reply
const LOST = "The connection was lost before the reply ended.";

// The model's name and the server's defaults. Throws if there is no response.
export async function health() {
  const response = await fetch("/health", { cache: "no-store" });
  return response.ok ? response.json() : {};
}

// Yields the events of a reply. The first is {dropped}: the number of early messages that the model
// does not see. Throws an Error with a message for the reader and the response's status (0 without
// a response).
export async function* complete(turns, { temperature, top_k, max_tokens, key }, signal) {
  const [messages, cut] = toMessages(turns);
  const headers = {
    "Content-Type": "application/json",
    ...(key ? { Authorization: `Bearer ${key}` } : {}),
  };
  const body = JSON.stringify({ messages, temperature, top_k, max_tokens });
  const response = await orLost(
    fetch("/chat/completions", { method: "POST", headers, body, signal }),
    signal,
    "The message could not be sent.",
  );
  if (!response.ok) throw await toError(response);
  yield { dropped: cut + Number(response.headers.get("X-Dropped-Messages") ?? 0) };
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const chunk = await orLost(reader.read(), signal, LOST);
    if (chunk.done) throw new Error(LOST);
    const blocks = (rest + chunk.value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks.filter((line) => line.startsWith("data: "))) {
      const event = JSON.parse(block.slice(6));
      if (event.error) throw new Error(sentence(event.error));
      if (event.done) return;
      yield event;
    }
  }
}

async function orLost(promise, signal, message) {
  try {
    return await promise;
  } catch (error) {
    if (signal.aborted) throw error;
    throw Object.assign(new Error(message), { status: 0 });
  }
}

async function toError(response) {
  const { status, statusText } = response;
  const answer = await response.json().catch(() => ({}));
  const detail = answer.detail ?? answer.error?.message;
  let text = detail ? sentence(detail) : `The server returned ${status} ${statusText}.`;
  if (status === 401) text = "This server requires an API key. Enter it in the settings.";
  if (status === 503) text = `The server is busy. ${text}`;
  return Object.assign(new Error(text), { status });
}

const sentence = (text) =>
  `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;

// Returns the messages of a request and how many early ones were left out to stay within the
// server's limits. Tool calls become parts. Questions without a reply are left out.
function toMessages(turns) {
  const chat = turns.filter((turn) => turn.role !== "note");
  const messages = chat.flatMap((turn, index) => {
    const answered = index === chat.length - 1 || chat[index + 1].parts?.length;
    if (turn.role === "user") return answered ? [{ role: "user", content: turn.text }] : [];
    if (!turn.parts.length) return [];
    const content = turn.parts.flatMap((part) => {
      if (part.type === "text") return [part];
      const call = { type: "python", text: part.expression };
      return part.output === null ? [call] : [call, { type: "python_output", text: part.output }];
    });
    return [{ role: "assistant", content: content.slice(0, MAX_PARTS) }];
  });
  const length = ({ content }) =>
    typeof content === "string"
      ? content.length
      : content.reduce((sum, part) => sum + part.text.length, 0);
  const total = messages.length;
  let chars = messages.reduce((sum, message) => sum + length(message), 0);
  while (messages.length > 2 && (chars > MAX_CHARS || messages.length > MAX_MESSAGES)) {
    for (const message of messages.splice(0, 2)) chars -= length(message);
  }
  return [messages, total - messages.length];
}
