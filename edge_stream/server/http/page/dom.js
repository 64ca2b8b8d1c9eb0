// Small helpers to make nodes.

// h("p", {className: "x"}, "text", node): an element with properties and children; strings become text.
export function h(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

export const $ = (id) => document.getElementById(id);

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.append(document.createElementNS("http://www.w3.org/2000/svg", "use"));
  svg.firstChild.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  return svg;
}

export function button(label, onclick, properties = {}) {
  return h("button", { type: "button", onclick, ...properties }, label);
}

export function iconButton(name, label, onclick) {
  const node = h("button", { type: "button", className: "icon", ariaLabel: label, title: label, onclick });
  node.append(icon(name));
  return node;
}

export function copyButton(label, text) {
  return button("Copy", async (event) => {
    const done = await copy(text());
    event.target.textContent = done ? "Copied" : "Not copied";
    setTimeout(() => (event.target.textContent = "Copy"), 1500);
  }, { ariaLabel: label });
}

// The clipboard needs a secure origin; a server reached by plain HTTP from another machine is none.
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = h("textarea", { value: text, className: "hidden" });
    const focused = document.activeElement;
    (document.querySelector("dialog[open]") ?? document.body).append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return done;
  }
}

// A text field as high as its text; the style sheet has the limit.
export function fit(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight + 2}px`;
}

export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
