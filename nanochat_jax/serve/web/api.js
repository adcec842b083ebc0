// The server, as the page sees it.

export const MAX_MESSAGE_CHARS = 8000; // of what the user writes
const MAX_CHARS = 32000; // of a request's messages together, and their number, as the server has it
const MAX_MESSAGES = 500;
const MAX_PARTS = 1000; // of a reply
const LOST = "The connection was lost before the reply ended.";

// About the model and the server's defaults; throws if there is no answer.
export async function health() {
  const response = await fetch("/health", { cache: "no-store" });
  return response.ok ? response.json() : {};
}

// The events of a reply; first {dropped: number}, how many of the first messages the model does not see.
// Throws an Error in words for the reader, with `.status` where the server answered with one.
export async function* complete(turns, { temperature, top_k, max_tokens, key }, signal) {
  const [messages, cut] = toMessages(turns);
  const headers = { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const body = JSON.stringify({ messages, temperature, top_k, max_tokens });
  const response = await unlessGone(fetch("/chat/completions", { method: "POST", headers, body, signal }), signal,
    "The message could not be sent.");
  if (!response.ok) throw await refusal(response);
  yield { dropped: cut + Number(response.headers.get("X-Dropped-Messages") ?? 0) };
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const chunk = await unlessGone(reader.read(), signal, LOST);
    if (chunk.done) throw new Error(LOST);
    const blocks = (rest + chunk.value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks.filter((each) => each.startsWith("data: "))) {
      const event = JSON.parse(block.slice(6));
      if (event.error) throw new Error(sentence(event.error));
      if (event.done) return;
      yield event;
    }
  }
}

// With status 0, upon which the page finds out whether the server is there at all, and says so.
async function unlessGone(promise, signal, told) {
  try {
    return await promise;
  } catch (error) {
    if (signal.aborted) throw error;
    throw Object.assign(new Error(told), { status: 0 });
  }
}

async function refusal(response) {
  const answer = await response.json().catch(() => ({}));
  const detail = answer.detail ?? answer.error?.message;
  let text = detail ? sentence(detail) : `The server answered ${response.status} ${response.statusText}.`;
  if (response.status === 401) text = "This server asks for an API key: enter it in the settings.";
  if (response.status === 503) text = `The server cannot take more right now. ${text}`;
  return Object.assign(new Error(text), { status: response.status });
}

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}${/[.!?]$/.test(text) ? "" : "."}`;

// What the server is sent: questions with their answers, tool calls as parts. A question without an answer is left
// out, and so are the first messages of what is too long; the second value is their number.
function toMessages(turns) {
  const chat = turns.filter((turn) => turn.role !== "note");
  const messages = chat.flatMap((turn, index) => {
    const answered = index === chat.length - 1 || chat[index + 1].parts?.length;
    if (turn.role === "user") return answered ? [{ role: "user", content: turn.text }] : [];
    if (!turn.parts.length) return [];
    const content = turn.parts.flatMap((part) => {
      if (part.type === "text") return [part];
      const called = [{ type: "python", text: part.expression }];
      return part.output === null ? called : [...called, { type: "python_output", text: part.output }];
    });
    return [{ role: "assistant", content: content.slice(0, MAX_PARTS) }];
  });
  const length = ({ content }) =>
    (typeof content === "string" ? content.length : content.reduce((sum, part) => sum + part.text.length, 0));
  const all = messages.length;
  let chars = messages.reduce((sum, message) => sum + length(message), 0);
  while (messages.length > 2 && (chars > MAX_CHARS || messages.length > MAX_MESSAGES)) {
    for (const message of messages.splice(0, 2)) chars -= length(message);
  }
  return [messages, all - messages.length];
}
