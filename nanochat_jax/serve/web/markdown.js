// The Markdown that a chat model writes, as DOM nodes. What it wrote only ever becomes text nodes, never HTML; a link
// goes to http, https or mailto alone and shows its host; an image is a link, so that nothing is loaded unasked.

import { copyButton, element, icon } from "./dom.js";
import { highlight } from "./highlight.js";

// A tool call stands in the text as one private-use character, its number; those are taken out of what the model wrote.
const TOOLS = 0xe000;
const TOOL = /[\uE000-\uF8FF]/;
const MAX_DEPTH = 8; // of quotes in quotes and lists in lists

const FENCE = /^ *(`{3,}|~{3,})\s*([\w+#.-]*)[^`\uE000-\uF8FF]*$/;
const FORMULA = /^ *(?:\$\$|\\\[)\s*$/; // begins what is shown as it was written, in TeX
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(?=\S)/;
const TABLE = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;

// parts: [{type: "text", text} | {type: "tool", expression, output}]
export function render(parts) {
  const tools = parts.filter((part) => part.type === "tool").slice(0, 6400);
  let count = 0;
  const text = parts.map((part) => {
    if (part.type === "tool") return count < tools.length ? String.fromCharCode(TOOLS + count++) : "";
    return part.text.replace(/[\uE000-\uF8FF]/g, "");
  }).join("");
  const out = document.createDocumentFragment();
  out.append(...blocks(text.replaceAll("\t", "    ").split(/\r?\n/), { tools, depth: 0 }));
  return out;
}

function blocks(lines, context) {
  const out = [];
  const startsTable = (at) => lines[at]?.includes("|") && lines[at + 1]?.includes("|") && TABLE.test(lines[at + 1]);
  const startsBlock = (at) =>
    [FENCE, FORMULA, HEADING, RULE, QUOTE, ITEM].some((kind) => kind.test(lines[at])) || startsTable(at);
  let at = 0;
  while (at < lines.length) {
    const from = at;
    const line = lines[at];
    const [fence, heading] = [line.match(FENCE), line.match(HEADING)];
    if (!line.trim()) {
      at++;
    } else if (fence || FORMULA.test(line)) {
      const ends = fence ? new RegExp(`^ *${fence[1][0]}{${fence[1].length},}\\s*$`) : /^ *(?:\$\$|\\\])\s*$/;
      for (at++; at < lines.length && !ends.test(lines[at]);) at++;
      out.push(codeBlock(lines.slice(from + 1, at++).join("\n"), fence ? fence[2].toLowerCase() : "math", context));
    } else if (heading) {
      out.push(element(`h${Math.min(6, heading[1].length + 2)}`, ...inline(heading[2], context)));
      at++;
    } else if (RULE.test(line)) {
      out.push(element("hr"));
      at++;
    } else if (QUOTE.test(line) && context.depth < MAX_DEPTH) {
      while (at < lines.length && QUOTE.test(lines[at])) at++;
      const inner = lines.slice(from, at).map((each) => each.replace(QUOTE, ""));
      out.push(element("blockquote", ...blocks(inner, { ...context, depth: context.depth + 1 })));
    } else if (ITEM.test(line) && context.depth < MAX_DEPTH) {
      at = list(lines, at, context, out);
    } else if (startsTable(at)) {
      for (at += 2; at < lines.length && lines[at].includes("|");) at++;
      out.push(table(lines.slice(from, at), context));
    } else {
      do at++; while (at < lines.length && lines[at].trim() && !startsBlock(at));
      const paragraph = lines.slice(from, at);
      out.push(element("p", ...paragraph.flatMap((each, index) =>
        [...(index ? [element("br")] : []), ...inline(each.trim(), context)])));
    }
  }
  return out;
}

// A list and what is indented below its items; returns the line after it.
function list(lines, at, context, out) {
  const [, indentation, number] = lines[at].match(ITEM);
  const items = element(number ? "ol" : "ul");
  if (number) items.start = Number(number);
  const belongs = (line) => line !== undefined && line.match(/^ */)[0].length > indentation.length;
  while (at < lines.length) {
    const item = lines[at].match(ITEM);
    if (!item || item[1].length !== indentation.length || Boolean(item[2]) !== Boolean(number)) break;
    if (RULE.test(lines[at])) break;
    const below = [];
    const first = lines[at++].slice(item[0].length);
    while (belongs(lines[at]) || (at < lines.length && !lines[at].trim() && belongs(lines[at + 1]))) {
      below.push(lines[at++]);
    }
    const texts = below.filter((line) => line.trim());
    const shift = Math.min(...texts.map((line) => line.match(/^ */)[0].length));
    const children = blocks(below.map((line) => line.slice(shift)), { ...context, depth: context.depth + 1 });
    items.append(element("li", ...inline(first, context), ...children));
    if (lines[at] === "" && ITEM.test(lines[at + 1] ?? "")) at++; // one empty line between items
  }
  out.push(items);
  return at;
}

function table([head, dashes, ...rows], context) {
  const cells = (row) => row.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const sides = cells(dashes).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? ".center" : ".right") : ""));
  const line = (row, kind) => {
    const given = cells(row);
    return element("tr", ...sides.map((side, at) => element(kind + side, ...inline(given[at] ?? "", context))));
  };
  const body = element("tbody", ...rows.map((row) => line(row, "td")));
  return element("div.table", element("table", element("thead", line(head, "th")), body));
}

function codeBlock(code, language, context) {
  const pieces = withTools(code, context, (text) => highlight(text, language));
  const head = element("div.code-head", element("span", language || "code"), copyButton(() => code));
  return element("div.code", head, element("pre", element("code", ...pieces)));
}

// `code`, formulas as \(x\), \[x\], $$x$$ or $x$ (not $5 and $6), [text](link), ![text](image), <link>, link, **bold**,
// ~~struck~~, *italic* (not 2*3*4), _italic_
const SPANS = new RegExp([
  /(?<ticks>`+)(?<code>[^`]+)\k<ticks>(?!`)/,
  /(?<formula>\\\((?:(?!\\\().)+?\\\)|\\\[(?:(?!\\\[).)+?\\\]|\$\$[^$]+\$\$)|(?<![\w$])\$(?<tex>[^\s$](?:[^$]*[^\s$])?)\$(?![\w$])/,
  /!?\[(?<label>[^[\]]*)\]\(\s*<?(?<target>[^\s()<>]+(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?:\s+"[^"]*")?\s*\)/,
  /(?<bare>\bhttps?:\/\/[^\s<>"'`)\]*]+[^\s<>"'`)\]*.,:;!?])/,
  /\*\*(?=\S)(?<bold>(?:(?!\*\*).)*\S)\*\*/,
  /~~(?=\S)(?<struck>[^~]*\S)~~/,
  /(?<![*\w])\*(?=[^*\s])(?<italic>[^*]*[^*\s])\*(?![*\w])/,
  /(?<![_\w])_(?=[^_\s])(?<under>[^_]*[^_\s])_(?![_\w])/,
  /\\(?<escaped>[\\`*_{}[\]()#+.!|~>-])/,
].map((part) => part.source).join("|"), "g");

function inline(text, context) {
  const nodes = [];
  let from = 0;
  for (const match of text.matchAll(SPANS)) {
    const { formula, tex, label, target, bare, bold, struck, italic, under, escaped } = match.groups;
    const code = match.groups.code ?? tex ?? formula?.slice(2, -2);
    let made;
    if (code) made = element("code", ...withTools(code.trim(), context));
    else if (bare) made = link(bare, bare, context);
    else if (target) made = link(target, label, context);
    else if (escaped) made = escaped;
    else if (bold) made = element("strong", ...inline(bold, context));
    else if (struck) made = element("s", ...inline(struck, context));
    else made = element("em", ...inline(italic ?? under, context));
    if (made === null) continue; // a link to somewhere it must not go stays as it was written
    nodes.push(...withTools(text.slice(from, match.index), context), made);
    from = match.index + match[0].length;
  }
  return [...nodes, ...withTools(text.slice(from), context)];
}

function link(target, label, context) {
  if (TOOL.test(target) || !/^(https?:\/\/|mailto:)/i.test(target) || !URL.canParse(target)) return null;
  const url = new URL(target);
  if (url.username && url.protocol !== "mailto:") return null; // https://bank.example@evil.example
  const node = element("a", ...withTools(label || target, context));
  node.href = url.href;
  node.title = url.href;
  node.target = "_blank";
  node.rel = "noopener noreferrer nofollow";
  if (label && label !== target && url.host) node.append(element("span.host", ` (${url.host})`));
  return node;
}

function withTools(text, context, make = (piece) => [piece]) {
  return text.split(/([\uE000-\uF8FF])/).flatMap((piece) => {
    if (!piece) return [];
    return TOOL.test(piece) ? [toolChip(context.tools[piece.charCodeAt(0) - TOOLS])] : make(piece);
  });
}

function toolChip({ expression, output }) {
  const result = output === null ? element("span.failed", "no result") : element("b", output);
  const chip = element("span.tool", icon("calculator"), element("span", expression, " = ", result));
  chip.title = "The model used the calculator";
  return chip;
}
