// Renders a reply: marked parses the Markdown, highlight.js colours code, DOMPurify sanitizes the
// HTML. HTML in the reply is shown as text, except <br>, <sub> and <sup>. Images become links.

import { copyButton, element, icon } from "./dom.js";
import DOMPurify from "./vendor/dompurify/purify.es.mjs";
import hljs from "./vendor/highlight/highlight.min.js";
import { Marked, Tokenizer } from "./vendor/marked/marked.esm.js";

const MAX_DEPTH = 8; // nested quotes and lists; the parser is recursive
const SANITIZER = {
  ALLOWED_TAGS: (
    "#text a blockquote br code del em h1 h2 h3 h4 h5 h6 hr li ol p pre span strong sub sup " +
    "table tbody td th thead tr ul"
  ).split(" "),
  ALLOWED_ATTR: ["href", "class", "start", "align"],
  ADD_URI_SAFE_ATTR: ["start", "align"],
  ALLOWED_URI_REGEXP: /^(?:https?:\/\/|mailto:)/i,
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

// In the Markdown, tool calls are numbered private-use characters. Those of the model are removed.
const FIRST_TOOL = 0xe000;
const MAX_TOOLS = 6400;
const TOOLS = /[\uE000-\uF8FF]/g;

const escape = (text) => text.replace(/[&<>"']/g, (character) => `&#${character.charCodeAt(0)};`);

// Where chat models depart from CommonMark.
class ReplyTokenizer extends Tokenizer {
  depth = 0;

  blockquote(src) {
    return this.nested(() => super.blockquote(src));
  }

  list(src) {
    return this.nested(() => super.list(src));
  }

  nested(parse) {
    if (this.depth >= MAX_DEPTH) return undefined;
    this.depth++;
    try {
      return parse();
    } finally {
      this.depth--;
    }
  }

  code() {} // indented text is not code

  lheading() {} // a list that starts below a paragraph would flash as a heading while it streams

  html() {}

  tag(src) {
    return /^<\/?(?:br|sub|sup) ?\/?>/i.test(src) ? super.tag(src) : undefined;
  }

  emStrong(src, masked, previous) {
    // 2*3*4 is a multiplication
    return /[\w*]/.test(previous) ? undefined : super.emStrong(src, masked, previous);
  }
}

// Formulas are shown as TeX source: as code, so that Markdown in them is not interpreted.
const BLOCK_FORMULA = /^ *(?:\$\$|\\\[) *\n([^]*?)(?:\n *(?:\$\$|\\\]) *(?=\n|$)|$)/;
const FORMULA = new RegExp(
  [
    /^\\\(((?:(?!\\\().)+?)\\\)/,
    /^\\\[((?:(?!\\\[).)+?)\\\]/,
    /^\$\$([^$]+)\$\$/,
    /^\$([^\s$](?:[^$]*[^\s$])?)\$(?![\w$])/,
  ]
    .map(({ source }) => source)
    .join("|"),
);
const FORMULAS = [
  {
    name: "block-formula",
    level: "block",
    start(src) {
      const paragraph = src.slice(0, (src.indexOf("\n\n") + 1 || src.length + 1) - 1);
      const at = paragraph.search(/\n *(?:\$\$|\\\[) *(?:\n|$)/);
      return at < 0 ? undefined : at + 1;
    },
    tokenizer(src) {
      const match = src.match(BLOCK_FORMULA);
      return match && { type: "code", raw: match[0], lang: "math", text: match[1] };
    },
  },
  {
    name: "formula",
    level: "inline",
    start: (src) => src.indexOf("$"),
    tokenizer(src, tokens) {
      const match = src.match(FORMULA);
      if (!match) return undefined;
      const [raw, ...texts] = match;
      const isPrice = raw[0] === "$" && /[\w$]$/.test(tokens.at(-1)?.raw ?? ""); // US$5
      return isPrice ? undefined : { type: "codespan", raw, text: texts.find(Boolean).trim() };
    },
  },
];

function link(href, raw, label) {
  if (!URL.canParse(href)) return escape(raw);
  const url = new URL(href);
  const isMail = url.protocol === "mailto:";
  if (!isMail && (!/^https?:$/.test(url.protocol) || url.username)) return escape(raw);
  return `<a href="${escape(url.href)}">${label || escape(href)}</a>`;
}

const RENDERER = {
  code({ text, lang }) {
    const language = (lang ?? "").match(/^[\w+#.-]*/)[0].toLowerCase();
    const code = hljs.getLanguage(language)
      ? hljs.highlight(text, { language, ignoreIllegals: true }).value
      : escape(text);
    return `<pre><code class="language-${language}">${code}</code></pre>`;
  },
  heading({ tokens, depth }) {
    // the page has headings above these
    const name = `h${Math.min(6, depth + 2)}`;
    return `<${name}>${this.parser.parseInline(tokens)}</${name}>`;
  },
  link({ href, raw, tokens }) {
    return link(href, raw, this.parser.parseInline(tokens).replace(/<\/?a\b[^>]*>/g, ""));
  },
  image: ({ href, raw, text }) => link(href, raw, escape(text)),
  checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
};

const marked = new Marked({ gfm: true, breaks: true, renderer: RENDERER, extensions: FORMULAS });
marked.setOptions({ tokenizer: new ReplyTokenizer() });

const drawn = new WeakMap(); // a reply's element to its blocks: [{key, nodes}]

// Makes `node` show the parts of a reply:
//   [{type: "text", text} | {type: "tool", expression, output}]
// Blocks that did not change since the last call keep their nodes: a long reply streams smoothly.
export function render(node, parts) {
  const tools = parts.filter((part) => part.type === "tool").slice(0, MAX_TOOLS);
  let count = 0;
  const markdown = parts
    .map((part) => {
      if (part.type === "text") return part.text.replace(TOOLS, "");
      return count < tools.length ? String.fromCharCode(FIRST_TOOL + count++) : "";
    })
    .join("");
  const tokens = marked.lexer(markdown);
  const links = JSON.stringify(tokens.links); // a definition at the end changes the blocks above it
  const old = drawn.get(node) ?? [];
  const changed = tokens.findIndex((token, at) => old[at]?.key !== token.raw + links);
  const from = changed < 0 ? tokens.length : changed;
  for (const { nodes } of old.slice(from)) for (const child of nodes) child.remove();
  const blocks = tokens.slice(from).map((token) => {
    const fragment = sanitize(marked.parser([token]));
    addControls(fragment, tools);
    return { key: token.raw + links, nodes: [...fragment.childNodes] };
  });
  node.append(...blocks.flatMap(({ nodes }) => nodes));
  drawn.set(node, [...old.slice(0, from), ...blocks]);
}

export const sanitize = (html) => DOMPurify.sanitize(html, SANITIZER);

// What the sanitizer would not let through: buttons, link targets, tool calls.
function addControls(fragment, tools) {
  const walker = document.createTreeWalker(fragment, NodeFilter.SHOW_TEXT);
  const texts = [];
  while (walker.nextNode()) texts.push(walker.currentNode);
  for (const text of texts.filter(({ data }) => data.match(TOOLS))) {
    text.replaceWith(
      ...text.data.split(/([\uE000-\uF8FF])/).map((piece) => {
        const tool = piece.match(TOOLS) && tools[piece.charCodeAt(0) - FIRST_TOOL];
        return tool ? toolCall(tool) : piece;
      }),
    );
  }
  for (const anchor of fragment.querySelectorAll("a")) completeLink(anchor);
  for (const table of fragment.querySelectorAll("table")) {
    const frame = element("div.table");
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const pre of fragment.querySelectorAll("pre")) {
    const code = pre.firstChild;
    const language = code.className.replace("language-", "") || "code";
    const head = element(
      "div.code-head",
      element("span", language),
      copyButton(() => code.textContent),
    );
    const frame = element("div.code", head);
    pre.replaceWith(frame);
    frame.append(pre);
  }
}

// Opens in a new tab and shows its host, unless the text starts with it.
function completeLink(anchor) {
  anchor.title = anchor.href;
  anchor.target = "_blank";
  anchor.rel = "noopener noreferrer nofollow";
  const [text] = anchor.textContent.replace(/^https?:\/\//i, "").split(/[/?#]/);
  if (anchor.host && text !== anchor.host) anchor.append(element("span.host", ` (${anchor.host})`));
}

function toolCall({ expression, output }) {
  const result = output === null ? element("span.failed", "no result") : element("b", output);
  const node = element("span.tool", icon("calculator"), element("span", expression, " = ", result));
  node.title = "The model used the calculator";
  return node;
}
