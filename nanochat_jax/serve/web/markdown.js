// The little markdown that a chat model writes, as DOM nodes. Text only ever becomes text nodes, never HTML.

const TOOL = "\uE000"; // stands for a tool call in the text; taken out of what the model wrote

// parts: [{type: "text", text} | {type: "tool", expression, output}]
export function render(parts) {
  const tools = parts.filter((part) => part.type === "tool").map(toolChip);
  const text = parts.map((part) => (part.type === "tool" ? TOOL : part.text.replaceAll(TOOL, ""))).join("");
  const out = document.createDocumentFragment();
  const lines = text.split("\n");
  let at = 0;
  while (at < lines.length) {
    const fence = lines[at].match(/^\s*(```|~~~)/);
    if (fence) {
      const code = [];
      for (at++; at < lines.length && !lines[at].trim().startsWith(fence[1]); at++) code.push(lines[at]);
      at++;
      out.append(element("pre", element("code", ...withTools(code.join("\n"), tools))));
    } else if (!lines[at].trim()) {
      at++;
    } else if (/^#{1,6} /.test(lines[at])) {
      out.append(element("h3", ...inline(lines[at++].replace(/^#+ /, ""), tools)));
    } else if (isItem(lines[at])) {
      at = list(lines, at, tools, out);
    } else {
      const paragraph = [];
      do paragraph.push(lines[at++]);
      while (at < lines.length && lines[at].trim() && !isItem(lines[at]) && !/^(\s*(```|~~~)|#{1,6} )/.test(lines[at]));
      const nodes = paragraph.flatMap((line, index) => [...(index ? [element("br")] : []), ...inline(line, tools)]);
      out.append(element("p", ...nodes));
    }
  }
  return out;
}

function isItem(line) {
  return /^\s*([-*+]|\d{1,9}[.)]) +\S/.test(line);
}

// A list, one level deep below each item; returns the line after it.
function list(lines, at, tools, out) {
  const indentation = (line) => line.match(/^\s*/)[0].length;
  const base = indentation(lines[at]);
  const number = lines[at].match(/^\s*(\d+)[.)]/);
  const items = element(number ? "ol" : "ul");
  if (number) items.start = Number(number[1]);
  while (at < lines.length) {
    if (!lines[at].trim() && isItem(lines[at + 1] ?? "") && Boolean(number) === /^\s*\d/.test(lines[at + 1])) {
      at++; // one empty line between items
    } else if (!isItem(lines[at])) {
      break;
    } else if (indentation(lines[at]) > base && items.lastChild) {
      at = list(lines, at, tools, items.lastChild);
    } else if (indentation(lines[at]) < base || Boolean(number) !== /^\s*\d/.test(lines[at])) {
      break;
    } else {
      items.append(element("li", ...inline(lines[at++].replace(/^\s*([-*+]|\d+[.)]) +/, ""), tools)));
    }
  }
  out.append(items);
  return at;
}

// `code`, **bold**, *italic* (not 2*3*4)
const SPANS = /`([^`]+)`|\*\*(\S(?:[^*]*\S)?)\*\*|(?<![*\w])\*([^*\s](?:[^*]*[^*\s])?)\*(?![*\w])/g;

function inline(text, tools) {
  const nodes = [];
  let from = 0;
  for (const match of text.matchAll(SPANS)) {
    nodes.push(...withTools(text.slice(from, match.index), tools));
    if (match[1]) nodes.push(element("code", ...withTools(match[1], tools)));
    else nodes.push(element(match[2] ? "strong" : "em", ...inline(match[2] ?? match[3], tools)));
    from = match.index + match[0].length;
  }
  nodes.push(...withTools(text.slice(from), tools));
  return nodes;
}

function withTools(text, tools) {
  return text.split(TOOL).flatMap((piece, index) => [...(index ? [tools.shift()] : []), ...(piece ? [piece] : [])]);
}

function toolChip({ expression, output }) {
  const chip = element("span", icon("M5 3h14v18H5zM8 7h8M8 12h.01M12 12h.01M16 12h.01M8 16h.01M12 16h.01M16 16h.01"));
  chip.className = "tool";
  chip.title = "Calculator";
  chip.append(output === null ? `${expression} = ?` : `${expression} = ${output}`);
  return chip;
}

export function icon(path) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
  line.setAttribute("d", path);
  svg.append(line);
  return svg;
}

export function element(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}
