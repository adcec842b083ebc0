// The settings: saved in the browser. A value that is not set is the server's default.

import { $, button, element } from "./dom.js";
import { readSettings, writeSettings } from "./store.js";

export const settings = readSettings();
let defaults = {};

const NUMBERS = {
  temperature: { name: "temperature", min: 0, max: 2 },
  topk: { name: "top_k", min: 0, max: 200, whole: true },
  length: { name: "max_tokens", min: 1, max: 4096, whole: true }, // at most the model's context
};

const range = ({ min, max, whole }) => `a ${whole ? "whole " : ""}number from ${min} to ${max}`;

// For a request. The server's default replaces what is undefined.
export function sampling() {
  const { temperature, top_k, max_tokens, key } = settings;
  return { temperature, top_k, max_tokens, key };
}

// Runs a slash command: "temperature 0.5" sets, "temperature" shows. Returns Markdown.
export function command(word, value) {
  if (word === "help") return help();
  if (!Object.hasOwn(NUMBERS, word))
    return `There is no command \`/${word}\`. \`/help\` lists all commands.`;
  if (value !== undefined && !set(word, value))
    return `\`${word}\` must be ${range(NUMBERS[word])}, not \`${value}\`.`;
  const current = settings[NUMBERS[word].name] ?? defaultOf(word) ?? "the server's default";
  return `\`${word}\` is ${value === undefined ? "" : "now "}${current}.`;
}

const help = () => `\
- \`/temperature 0.8\`: sampling temperature, 0 to 2
- \`/topk 50\`: sample from the most likely tokens, 0 (all) to 200
- \`/length 512\`: most tokens of a reply, 1 to ${NUMBERS.length.max}
- \`/clear\`: new conversation (Ctrl+Shift+O)
- \`/help\`: this list

Without a number, a command shows the current value.
Enter sends, Shift+Enter adds a line, Escape stops a reply.`;

function defaultOf(word) {
  const { name, max } = NUMBERS[word];
  return defaults[name] === undefined ? undefined : Math.min(defaults[name], max);
}

function set(word, text) {
  const { name, min, max, whole } = NUMBERS[word];
  const value = Number(text);
  if (!text.trim() || !(value >= min && value <= max) || (whole && !Number.isInteger(value)))
    return false;
  choose(name, value);
  return true;
}

export function choose(name, value) {
  settings[name] = value;
  writeSettings(settings);
}

// Takes the response of /health.
export function showModel({ model, defaults: given }) {
  defaults = given ?? {};
  const { name = "", ...facts } = model ?? {};
  NUMBERS.length.max = Math.min(4096, facts.context ?? 4096);
  field("length").max = NUMBERS.length.max;
  $("longest").textContent = NUMBERS.length.max;
  $("model").textContent = name;
  $("model-info").replaceChildren(
    ...Object.entries(facts).flatMap(([key, value]) => [
      element("dt", key.replaceAll("_", " ")),
      element("dd", `${value}${key === "context" ? " tokens" : ""}`),
    ]),
  );
}

const dialog = $("settings");
const field = (word) => $(`set-${word}`);

function fill() {
  for (const [word, { name }] of Object.entries(NUMBERS)) {
    field(word).value = settings[name] ?? "";
    field(word).placeholder = defaultOf(word) ?? "";
    field(word).setCustomValidity("");
  }
  $("set-theme").value = settings.theme ?? "auto";
  $("set-key").value = settings.key ?? "";
}

function showTheme() {
  document.documentElement.dataset.theme = settings.theme ?? "auto";
}

// deleteAll: deletes all conversations; called after the user confirmed it.
export function setUp(deleteAll) {
  showTheme();
  $("open-settings").addEventListener("click", () => {
    fill();
    dialog.showModal();
  });
  $("close-settings").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // backdrop
  for (const [word, number] of Object.entries(NUMBERS)) {
    field(word).addEventListener("change", () => {
      const isEmpty = !field(word).value && !field(word).validity.badInput;
      if (isEmpty) choose(number.name, undefined);
      if (isEmpty || set(word, field(word).value)) return fill();
      field(word).setCustomValidity(`Enter ${range(number)}.`);
      field(word).reportValidity();
    });
  }
  $("set-theme").addEventListener("change", () => {
    choose("theme", $("set-theme").value);
    showTheme();
  });
  $("set-key").addEventListener("change", () =>
    choose("key", $("set-key").value.trim() || undefined),
  );
  const reset = button("Restore defaults", () => {
    for (const { name } of Object.values(NUMBERS)) choose(name, undefined);
    fill();
  });
  const clear = button("Delete all conversations", () => {
    if (!confirm("Delete all conversations in this browser?")) return;
    dialog.close();
    deleteAll();
  });
  clear.className = "danger";
  $("settings-actions").append(reset, clear);
}
