// The settings: what the user chose, kept in the browser; the server's defaults stand for the rest.

import { HELP } from "./commands.js";
import { $, button, element } from "./dom.js";
import { readSettings, writeSettings } from "./store.js";

export const settings = readSettings();
let defaults = {};

const NUMBERS = {
  temperature: { name: "temperature", min: 0, max: 2 },
  topk: { name: "top_k", min: 0, max: 200, whole: true },
  length: { name: "max_tokens", min: 1, max: 4096, whole: true }, // or the model's context, if that is less
};

const range = ({ min, max, whole }) => `a ${whole ? "whole " : ""}number from ${min} to ${max}`;

// What a request is sent; what is undefined is left to the server.
export function sampling() {
  const { temperature, top_k, max_tokens, key } = settings;
  return { temperature, top_k, max_tokens, key };
}

// /temperature 0.5 and such: what to tell the user, or null if there is no such setting.
export function command(word, value) {
  if (!Object.hasOwn(NUMBERS, word)) return null;
  if (value !== undefined && !set(word, value)) return `${word} must be ${range(NUMBERS[word])}, not ${value}.`;
  const current = settings[NUMBERS[word].name] ?? byDefault(word) ?? "the server's default";
  return `${word} is ${value === undefined ? "" : "now "}${current}.`;
}

export const help = () => HELP.replace("4096]", `${NUMBERS.length.max}]`.padEnd(5)); // its columns stay

// What a request gets that does not say.
function byDefault(word) {
  const { name, max } = NUMBERS[word];
  return defaults[name] === undefined ? undefined : Math.min(defaults[name], max);
}

function set(word, text) {
  const { name, min, max, whole } = NUMBERS[word];
  const value = Number(text);
  if (!text.trim() || !(value >= min && value <= max) || (whole && !Number.isInteger(value))) return false;
  choose(name, value);
  return true;
}

export function choose(name, value) {
  settings[name] = value;
  writeSettings(settings);
}

export function showModel({ model, defaults: given }) {
  defaults = given ?? {};
  const { name = "", ...facts } = model ?? {};
  NUMBERS.length.max = Math.min(4096, facts.context ?? 4096);
  field("length").max = NUMBERS.length.max;
  $("longest").textContent = NUMBERS.length.max;
  $("model").textContent = name;
  $("model-info").replaceChildren(...Object.entries(facts).flatMap(([name, value]) =>
    [element("dt", name.replaceAll("_", " ")), element("dd", `${value}${name === "context" ? " tokens" : ""}`)]));
}

const dialog = $("settings");
const field = (word) => $(`set-${word}`);

function fill() {
  for (const [word, { name }] of Object.entries(NUMBERS)) {
    field(word).value = settings[name] ?? "";
    field(word).placeholder = byDefault(word) ?? "";
    field(word).setCustomValidity("");
    $(`now-${word}`).textContent = settings[name] === undefined ? "The server's default." : "Your choice.";
  }
  $("set-theme").value = settings.theme ?? "auto";
  $("set-key").value = settings.key ?? "";
}

function showTheme() {
  document.documentElement.dataset.theme = settings.theme ?? "auto";
}

// deleteAll: called when the user wants all conversations gone.
export function setUp(deleteAll) {
  showTheme();
  $("open-settings").addEventListener("click", () => {
    fill();
    dialog.showModal();
  });
  $("close-settings").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // beside it
  for (const [word, number] of Object.entries(NUMBERS)) {
    field(word).addEventListener("change", () => {
      const isEmpty = !field(word).value && !field(word).validity.badInput;
      if (isEmpty) choose(number.name, undefined);
      if (isEmpty || set(word, field(word).value)) return fill();
      field(word).setCustomValidity(`This must be ${range(number)}.`);
      field(word).reportValidity();
    });
  }
  $("set-theme").addEventListener("change", () => {
    choose("theme", $("set-theme").value);
    showTheme();
  });
  $("set-key").addEventListener("change", () => choose("key", $("set-key").value.trim() || undefined));
  const reset = button("Back to the server's defaults", () => {
    for (const { name } of Object.values(NUMBERS)) choose(name, undefined);
    fill();
  });
  const forget = button("Delete all conversations", () => {
    if (!confirm("Delete all conversations kept in this browser?")) return;
    dialog.close();
    deleteAll();
  });
  forget.className = "danger";
  $("settings-actions").append(reset, forget);
}
