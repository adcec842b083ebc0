// Creates elements. Strings become text nodes, never HTML.

export const $ = (id) => document.getElementById(id);

const ICONS = {
  edit: "M4 20h4L19 9l-4-4L4 16zM13 7l4 4",
  again: "M20 11a8 8 0 1 0-2.3 6.3M20 4v7h-7",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  remove: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13",
  calculator: "M5 3h14v18H5zM8 7h8M8 12h.01M12 12h.01M16 12h.01M8 16h.01M12 16h.01M16 16h.01",
};

// element("p.note.small", "text", node, ...)
export function element(name, ...children) {
  const [tag, ...classes] = name.split(".");
  const node = document.createElement(tag);
  node.classList.add(...classes);
  node.append(...children);
  return node;
}

export function icon(name) {
  const make = (tag) => document.createElementNS("http://www.w3.org/2000/svg", tag);
  const [svg, line] = [make("svg"), make("path")];
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  line.setAttribute("d", ICONS[name]);
  svg.append(line);
  return svg;
}

export function button(label, act, iconName) {
  const node = element("button", ...(iconName ? [icon(iconName)] : []), element("span", label));
  node.type = "button";
  node.addEventListener("click", act);
  return node;
}

export function copyButton(text) {
  const node = button(
    "Copy",
    async () => {
      const copied = await copyText(text());
      node.lastChild.textContent = copied ? "Copied" : "Could not copy";
      setTimeout(() => {
        node.lastChild.textContent = "Copy";
      }, 1200);
    },
    "copy",
  );
  return node;
}

async function copyText(text) {
  if (navigator.clipboard)
    return navigator.clipboard.writeText(text).then(
      () => true,
      () => false,
    );
  const field = element("textarea.hidden", text); // no clipboard API over plain http
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  return copied;
}
