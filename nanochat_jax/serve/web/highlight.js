// Colours for code: comments, strings, numbers, keywords and calls, enough for what a chat model writes.

import { element } from "./dom.js";

const words = (text) => new Set(text.split(" "));
const C_LIKE = words("auto bool break case catch char class const continue default delete do double else enum export "
  + "extends false final float fn for func function if impl import in int interface let long loop match mut namespace "
  + "new null nullptr package private protected public pub return self short static string struct super switch "
  + "template this throw true try type typedef typeof undefined unsigned use using var virtual "
  + "void while async await of yield");
const PYTHON = words("and as assert async await break class continue def del elif else except False finally for from "
  + "global if import in is lambda match case None nonlocal not or pass raise return self True try while with yield");
const SHELL = words("if then else elif fi for while do done case esac in function return export local source echo cd");
const SQL = words("select from where and or not in is null as on join left right inner outer group by order having "
  + "limit insert into values update set delete create table drop distinct union case when then else end like");

const SLASH = String.raw`\/\/.*|\/\*[^]*?(?:\*\/|$)`;
const C = { comment: SLASH, keywords: C_LIKE };
const HASH = String.raw`#.*`;
const py = { comment: HASH, keywords: PYTHON };
const sh = { comment: String.raw`(?<![^\s;])#.*`, keywords: SHELL };
const sql = { comment: String.raw`--.*|\/\*[^]*?(?:\*\/|$)`, keywords: SQL, anyCase: true };
const data = { comment: HASH, keywords: words("true false null yes no") };
const LANGUAGES = {
  python: py, py, python3: py, bash: sh, sh, shell: sh, zsh: sh, sql, json: data, yaml: data, yml: data, toml: data,
  ...Object.fromEntries("c cpp c++ h java js javascript ts typescript jsx tsx rust rs go csharp cs kotlin swift php css"
    .split(" ").map((name) => [name, C])),
};
const STRING = String.raw`"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)|"(?:\\.|[^"\\\n])*"?|'(?:\\.|[^'\\\n])*'?`;
const NUMBER = String.raw`\b(?:0[xX][\da-fA-F]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\b`;

// Nodes of a piece of code; one text if the language is not known.
export function highlight(code, name) {
  const language = Object.hasOwn(LANGUAGES, name) ? LANGUAGES[name] : null;
  if (!language) return [code];
  const pattern = new RegExp(`(?<comment>${language.comment})|(?<string>${STRING})|(?<number>${NUMBER})`
    + String.raw`|(?<word>[A-Za-z_$][\w$]*)`, "g");
  const nodes = [];
  let from = 0;
  for (const match of code.matchAll(pattern)) {
    const { comment, string, number, word } = match.groups;
    const known = word && language.keywords.has(language.anyCase ? word.toLowerCase() : word);
    const kind = comment ? "comment" : string ? "string" : number ? "number"
      : known ? "keyword" : code[match.index + match[0].length] === "(" ? "call" : null;
    if (!kind) continue;
    nodes.push(code.slice(from, match.index), element(`span.hl-${kind}`, match[0]));
    from = match.index + match[0].length;
  }
  return [...nodes, code.slice(from)];
}
