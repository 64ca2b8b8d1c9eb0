// The messages of the shown conversation, as nodes. `actions` are the app's: edit, regenerate, goOn, choose.

import { siblings } from "./conversations.js";
import { button, copyButton, fit, h } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const NOTES = {
  length: "Reached the token limit.",
  stopped: "Stopped.",
  failed: "Incomplete.",
  writing: "",
  stop: "",
};

export class Messages {
  constructor(list, actions) {
    this.list = list;
    this.actions = actions;
  }

  // Show a branch; what is shown already stays as it is.
  show(conversation, messages) {
    let i = 0;
    while (i < messages.length && this.list.children[i]?.message === messages[i]) i++;
    while (this.list.children.length > i) this.list.lastChild.remove();
    for (; i < messages.length; i++) this.list.append(this.build(conversation, messages[i]));
  }

  // Rebuild one message's node, if it is shown.
  refresh(conversation, message) {
    const old = this.nodeOf(message);
    if (!old) return;
    const hadFocus = old.contains(document.activeElement);
    const node = this.build(conversation, message);
    old.replaceWith(node);
    if (hadFocus) node.focus();
  }

  nodeOf(message) {
    return [...this.list.children].findLast((node) => node.message === message);
  }

  // An answer has grown. Returns whether it is shown.
  grow(message) {
    const view = this.nodeOf(message)?.view;
    view?.update(message.content);
    return Boolean(view);
  }

  build(conversation, message) {
    const mine = message.role === "user";
    const node = h("article", { className: `message ${message.role}`, tabIndex: -1 }, h("h2", { className: "hidden" }, mine ? "You" : "Model"));
    const body = h("div", { className: "body", dir: "auto" });
    node.message = message;
    if (mine) {
      body.textContent = message.content;
    } else {
      node.view = new MarkdownView(body);
      node.view.update(message.content);
      node.classList.toggle("writing", message.state === "writing");
    }
    const recalled = message.info?.recalled;
    if (recalled) {
      const who = recalled.role === "user" ? "you" : "the model";
      const ago = `${recalled.messages_ago} message${recalled.messages_ago === 1 ? "" : "s"} ago`;
      node.append(h("p", { className: "recalled" }, `Recalled: ${ago}, ${who} said “${recalled.text}”`));
    }
    node.append(body);
    if (message.state !== "writing") node.append(this.foot(conversation, message, node));
    return node;
  }

  foot(conversation, message, node) {
    const { actions } = this;
    const mine = message.role === "user";
    const foot = h("div", { className: "foot" });
    const all = siblings(conversation, message);
    if (all.length > 1) {
      const at = all.indexOf(message);
      const step = (text, label, to) => button(text, () => actions.choose(all[to]), { ariaLabel: label, disabled: !all[to] });
      foot.append(
        h("span", { className: "branches" }, step("‹", "Previous version", at - 1), `${at + 1}/${all.length}`, step("›", "Next version", at + 1)),
      );
    }
    foot.append(copyButton(mine ? "Copy message" : "Copy answer", () => message.content));
    foot.append(button("Edit", () => this.edit(node), { ariaLabel: mine ? "Edit message" : "Edit answer" }));
    if (mine) {
      foot.append(button("Answer", () => actions.regenerate(message), { className: "last-only" }));
    } else {
      foot.append(button("Regenerate", () => actions.regenerate(message)));
      if (message.state !== "stop") foot.append(button("Continue", () => actions.goOn(message), { className: "last-only" }));
    }
    if (message.role === "assistant") foot.append(h("span", { className: "note" }, note(message)));
    return foot;
  }

  // Turn the text into a field; saving it starts a branch.
  edit(node) {
    const { message } = node;
    const field = h("textarea", { value: message.content, ariaLabel: "Edited message" });
    const close = () => {
      form.replaceWith(...old);
      node.focus();
    };
    const save = (event) => {
      event.preventDefault();
      if (!field.value.trim() || field.value === message.content) return close();
      close();
      this.actions.edit(message, field.value);
    };
    const form = h(
      "form",
      { className: "edit", onsubmit: save },
      field,
      h("div", { className: "row" }, button("Cancel", close), h("button", { className: "primary" }, message.role === "user" ? "Send" : "Save")),
    );
    field.addEventListener("input", () => fit(field));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing && message.role === "user") {
        save(event);
      }
    });
    const old = [...node.childNodes];
    node.replaceChildren(form);
    fit(field);
    field.focus();
  }
}

function note({ state, info }) {
  const parts = [];
  if (info?.n_written) parts.push(`${info.n_written} token${info.n_written === 1 ? "" : "s"}`);
  if (info?.tok_per_s > 0) parts.push(`${info.tok_per_s.toFixed(1)} tok/s`);
  return [parts.join(", "), NOTES[state]].filter(Boolean).join(" · ");
}
