// The settings: what the user chose, kept in the browser; the server's defaults stand for the rest.

import { $, button, element } from "./dom.js";
import { readSettings, writeSettings } from "./store.js";

export const settings = readSettings();
let defaults = {};

const NUMBERS = {
  temperature: { name: "temperature", min: 0, max: 2, range: "a number from 0 to 2" },
  topk: { name: "top_k", min: 0, max: 200, whole: true, range: "a whole number from 0 to 200" },
  length: { name: "max_tokens", min: 1, max: 4096, whole: true, range: "a whole number from 1 to 4096" },
};

// What a request is sent; what is undefined is left to the server.
export function sampling() {
  const { temperature, top_k, max_tokens, key } = settings;
  return { temperature, top_k, max_tokens, key };
}

// /temperature 0.5 and such: what to tell the user, or null if there is no such setting.
export function command(word, value) {
  if (!Object.hasOwn(NUMBERS, word)) return null;
  const { name, range } = NUMBERS[word];
  if (value !== undefined && !set(word, value)) return `${word} must be ${range}, not ${value}.`;
  const current = settings[name] ?? defaults[name] ?? "the server's default";
  return `${word} is ${value === undefined ? "" : "now "}${current}.`;
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
  $("model").textContent = name;
  $("model-info").replaceChildren(...Object.entries(facts).flatMap(([name, value]) =>
    [element("dt", name.replaceAll("_", " ")), element("dd", String(value))]));
}

const dialog = $("settings");
const field = (word) => $(`set-${word}`);

function fill() {
  for (const [word, { name }] of Object.entries(NUMBERS)) {
    field(word).value = settings[name] ?? defaults[name] ?? "";
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
  for (const [word, { range }] of Object.entries(NUMBERS)) {
    field(word).addEventListener("change", () => {
      if (set(word, field(word).value)) return fill();
      field(word).setCustomValidity(`This must be ${range}.`);
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
