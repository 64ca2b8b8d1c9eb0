// The page of edge-stream serve: state, and what the buttons do.

import { answer, props } from "./api.js";
import { Store, addMessage, choose, newConversation, path, removeMessage, storage, toChat } from "./conversations.js";
import { $, button, download, fit, h, iconButton } from "./dom.js";
import { showGauge } from "./gauge.js";
import { Messages } from "./messages.js";

const SETTINGS = "edge-stream/settings";
const THEME = "edge-stream/theme";
const KEY = "edge-stream/key";
const CURRENT = "edge-stream/current";
const SAVE_MS = 2000; // how often a growing answer is saved

const running = new Map(); // conversation id -> {controller, message}
const problems = new Map(); // conversation id -> {text, status, retry}, shown under its last message
let server = null; // what GET /props says
let sampling = readSettings();
let key = sessionKey();
const store = new Store((text) => notify(text));
let current = store.all.get(storage.get(CURRENT)) ?? store.list()[0] ?? newConversation();

const messages = new Messages($("messages"), {
  edit(message, content) {
    const copy = addMessage(current, message.parent, message.role, content);
    if (message.role === "user") return generate(current, copy);
    copy.state = "stop";
    store.put(current);
    show();
  },
  regenerate: (message) => generate(current, message.role === "user" ? message : parentOf(message)),
  goOn: (message) => generate(current, parentOf(message), message),
  choose(message) {
    choose(current, message);
    store.put(current);
    show();
    messages.nodeOf(message)?.focus({ preventScroll: true });
  },
});

const parentOf = (message) => current.messages.find((m) => m.id === message.parent);

//
// answers
//

// Answer a message of the user in a new branch, or go on with the answer `begun`.
async function generate(conversation, question, begun = null) {
  if (running.has(conversation.id)) return;
  problems.delete(conversation.id);
  const message = begun ?? addMessage(conversation, question.id, "assistant", "");
  const before = path({ ...conversation, leaf: begun ? message.id : question.id });
  const chat = toChat(conversation, before);
  const controller = new AbortController();
  running.set(conversation.id, { controller, message });
  Object.assign(message, { state: "writing", info: null });
  conversation.updated = Date.now();
  store.put(conversation);
  messages.refresh(conversation, message);
  if (conversation === current) {
    stick = true;
    show();
  }
  say(conversation, "Waiting for the server.");

  const drawing = new Drawing(conversation, message);
  let problem = null;
  try {
    const options = { key, conversation: conversation.id, signal: controller.signal };
    for await (const chunk of answer({ messages: chat, ...sampling }, options)) {
      const [choice] = chunk.choices;
      if (choice?.delta?.content) message.content += choice.delta.content;
      if (choice?.finish_reason) message.state = choice.finish_reason === "length" ? "length" : "stop";
      if (chunk.edge_stream) message.info = { ...message.info, ...chunk.edge_stream };
      if (chunk.timings) Object.assign(message.info, { tok_per_s: chunk.timings.predicted_per_second, n_written: chunk.timings.predicted_n });
      drawing.request();
    }
    if (message.state === "writing") message.state = "stop";
  } catch (error) {
    message.state = error.name === "AbortError" ? "stopped" : "failed";
    if (message.state === "failed") problem = error;
  }
  drawing.end();
  running.delete(conversation.id);
  const empty = !message.content.trim();
  if (empty) removeMessage(conversation, message);
  if (problem) {
    problems.set(conversation.id, { text: problem.message, status: problem.status, retry: () => generate(conversation, question, empty ? null : begun) });
    if (problem.status === 401) askKey(key ? "The server does not know this key." : undefined);
  }
  if (store.all.has(conversation.id)) store.put(conversation);
  if (conversation !== current) return;
  messages.refresh(conversation, message);
  show();
  if (!problem) say(conversation, empty ? "No answer." : `Answer: ${messages.nodeOf(message)?.querySelector(".body").textContent}`);
}

// Draws an answer as it grows: once per frame, and less often where that takes long.
class Drawing {
  constructor(conversation, message) {
    Object.assign(this, { conversation, message, next: 0, saved: Date.now(), timer: 0 });
  }

  request() {
    if (!this.timer) this.timer = setTimeout(() => requestAnimationFrame(() => this.draw()), Math.max(0, this.next - performance.now()));
  }

  draw() {
    if (!this.timer) return; // it has ended
    this.timer = 0;
    const start = performance.now();
    if (this.conversation === current && messages.grow(this.message)) {
      showGauge(this.message.info, server?.n_ctx);
      follow();
    }
    if (Date.now() > this.saved + SAVE_MS && store.all.has(this.conversation.id)) {
      store.put(this.conversation);
      this.saved = Date.now();
    }
    this.next = performance.now() + 4 * (performance.now() - start);
  }

  end() {
    clearTimeout(this.timer);
    this.timer = 0;
  }
}

//
// showing
//

function show() {
  const branch = path(current);
  messages.show(current, branch);
  $("empty").hidden = branch.length > 0;
  const busy = running.has(current.id);
  $("messages").classList.toggle("busy", busy);
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("title").textContent = current.title || "New conversation";
  document.title = current.title || "edge-stream";
  const problem = problems.get(current.id);
  $("problem").replaceChildren(...(problem ? [problem.text, " ", button("Retry", problem.retry)] : []));
  showGauge(branch.findLast((m) => m.info)?.info, server?.n_ctx);
  listConversations();
  follow();
}

function listConversations() {
  const rows = store.list().map((conversation) => {
    const isCurrent = conversation === current;
    const open = button(conversation.title || "New conversation", () => openConversation(conversation), { className: "open" });
    if (isCurrent) open.ariaCurrent = "true";
    const row = h("li", {}, open);
    if (isCurrent) {
      row.append(iconButton("rename", "Rename", () => rename(row, conversation)), iconButton("delete", "Delete", () => remove(conversation)));
    }
    return row;
  });
  if ($("conversations").querySelector("input")) return; // a name is being written
  $("conversations").replaceChildren(...rows);
}

// What a screen reader says; the whole answer once it is complete, not its pieces.
function say(conversation, text) {
  if (conversation === current) $("status").textContent = text;
}

// A sentence at the bottom, with something to do about it.
function notify(text, action = null, work = null) {
  const close = iconButton("close", "Close", () => $("notice").replaceChildren());
  const act = action ? [button(action, () => ($("notice").replaceChildren(), work()))] : [];
  $("notice").replaceChildren(h("span", {}, text), ...act, close);
}

//
// scrolling: with the newest text, unless somebody has scrolled up
//

const scroller = $("scroller");
let stick = true;
let lastTop = 0;

function follow() {
  if (stick) scroller.scrollTop = scroller.scrollHeight;
  $("to-end").hidden = stick || fromEnd() < 2;
}

const fromEnd = () => scroller.scrollHeight - scroller.clientHeight - scroller.scrollTop;

scroller.addEventListener("scroll", () => {
  const top = scroller.scrollTop;
  if (fromEnd() < 2) stick = true;
  else if (top < lastTop) stick = false; // text only grows: someone went up
  else if (fromEnd() < 24) stick = true;
  lastTop = top;
  $("to-end").hidden = stick;
});
new ResizeObserver(follow).observe(scroller);
$("to-end").onclick = () => {
  stick = true;
  follow();
  focusPrompt();
};

//
// conversations
//

function openConversation(conversation) {
  current = conversation;
  storage.set(CURRENT, current.id);
  stick = true;
  $("status").textContent = "";
  setNav(false);
  show();
  focusPrompt();
}

function remove(conversation) {
  running.get(conversation.id)?.controller.abort();
  store.remove(conversation);
  notify(`“${conversation.title}” was deleted.`, "Undo", () => {
    store.put(conversation);
    openConversation(conversation);
  });
  if (conversation === current) openConversation(store.list()[0] ?? newConversation());
}

function rename(row, conversation) {
  const field = h("input", { value: conversation.title, ariaLabel: "Name", maxLength: 200 });
  let done = false;
  const end = (keep) => {
    if (done) return;
    done = true;
    if (keep && field.value.trim()) conversation.title = field.value.trim();
    field.remove();
    store.put(conversation);
    show();
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.isComposing) end(true);
    if (event.key === "Escape") {
      event.stopPropagation();
      end(false);
    }
    if (done) $("conversations").querySelector("[aria-label=Rename]")?.focus();
  });
  field.addEventListener("blur", () => end(true));
  row.replaceChildren(field);
  field.select();
}

function exportConversations(list, name) {
  if (list.length === 0) return notify("There is nothing to export.");
  download(`${name.replace(/[^\p{L}\p{N} _-]/gu, "").trim().slice(0, 60) || "conversation"}.json`, store.export(list));
}

$("new").onclick = () => openConversation(newConversation());
$("export").onclick = () => exportConversations(store.list(), "edge-stream conversations");
$("export-one").onclick = () => exportConversations(current.messages.length ? [current] : [], current.title);
$("import").onclick = () => $("import-file").click();
$("import-file").onchange = async ({ target }) => {
  const [file] = target.files;
  if (!file) return;
  try {
    const found = store.import(await file.text());
    if (found.length) openConversation(found[0]);
    notify(`${found.length} conversation${found.length === 1 ? " was" : "s were"} imported.`);
  } catch (error) {
    notify(error.message);
  }
  target.value = "";
};
addEventListener("storage", ({ key: changed }) => {
  if ([...running.keys()].some((id) => changed?.endsWith(id))) return;
  const id = store.reread(changed);
  if (id === current.id) current = store.all.get(id) ?? store.list()[0] ?? newConversation();
  if (id) show();
});
addEventListener("pagehide", () => {
  for (const id of running.keys()) if (store.all.has(id)) store.put(store.all.get(id));
});

//
// writing
//

$("composer").onsubmit = (event) => {
  event.preventDefault();
  const content = $("prompt").value;
  if (!content.trim() || running.has(current.id)) return;
  $("prompt").value = "";
  fit($("prompt"));
  current.title ||= content.trim().split("\n")[0].slice(0, 60);
  storage.set(CURRENT, current.id);
  generate(current, addMessage(current, current.leaf, "user", content));
};
$("prompt").addEventListener("input", () => fit($("prompt")));
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
$("stop").onclick = () => {
  running.get(current.id)?.controller.abort();
  $("prompt").focus();
};
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (document.body.classList.contains("nav-open")) setNav(false);
  else running.get(current.id)?.controller.abort();
});

// Not where that would bring up a keyboard over half of the screen.
function focusPrompt() {
  if (!matchMedia("(pointer: coarse)").matches) $("prompt").focus();
}

//
// settings
//

const fields = [...$("settings").querySelectorAll("input[name]")];

function readSettings() {
  try {
    const kept = JSON.parse(storage.get(SETTINGS)) ?? {};
    return Object.fromEntries(Object.entries(kept).filter(([, value]) => typeof value === "number"));
  } catch {
    return {};
  }
}

$("open-settings").onclick = () => {
  $("system").value = current.system;
  for (const field of fields) field.value = sampling[field.name] ?? "";
  $("settings").showModal();
};
$("settings").addEventListener("close", () => {
  const filled = fields.filter((field) => field.value !== "" && field.validity.valid);
  sampling = Object.fromEntries(filled.map((field) => [field.name, field.valueAsNumber]));
  storage.set(SETTINGS, JSON.stringify(sampling));
  if (current.system === $("system").value) return;
  current.system = $("system").value;
  if (current.messages.length) store.put(current);
});

const THEMES = ["system", "light", "dark"];

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  $("theme").ariaLabel = $("theme").title = theme === "system" ? "Theme: as the system" : `Theme: ${theme}`;
}

$("theme").onclick = () => {
  const next = THEMES[(THEMES.indexOf(document.documentElement.dataset.theme) + 1) % THEMES.length];
  storage.set(THEME, next);
  setTheme(next);
};

const wide = matchMedia("(min-width: 800px)");

function setNav(open) {
  document.body.classList.toggle("nav-open", open);
  $("menu").ariaExpanded = String(open || wide.matches);
  document.querySelector("main").inert = open && !wide.matches;
  if (open) $("new").focus();
  else if ($("nav").contains(document.activeElement) && !wide.matches) $("menu").focus();
}

$("menu").onclick = () => setNav(!document.body.classList.contains("nav-open"));
$("shade").onclick = () => setNav(false);
wide.addEventListener("change", () => setNav(false));

//
// the server
//

function sessionKey() {
  try {
    return sessionStorage.getItem(KEY) ?? storage.get(KEY) ?? "";
  } catch {
    return "";
  }
}

function askKey(why = "This server answers only those who have a key.") {
  $("change-key").hidden = false;
  $("key-why").textContent = why;
  if (!$("key").open) $("key").showModal();
}

$("change-key").onclick = () => askKey();
$("key").querySelector("form").onsubmit = () => {
  key = $("key-value").value.trim();
  if ($("key-keep").checked) storage.set(KEY, key);
  else storage.remove(KEY);
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // it is known until the page is closed
  }
  $("key-value").value = "";
  connect();
};

async function connect() {
  try {
    server = await props(key);
  } catch (error) {
    if (error.status === 401) askKey(key ? "The server does not know this key." : undefined);
    else notify(error.message, "Retry", connect);
    return;
  }
  const { temp, ...others } = server.default_generation_settings;
  const defaults = { ...others, temperature: temp };
  for (const field of fields) if (field.name in defaults) field.placeholder = Number(defaults[field.name].toPrecision(4));
  $("model").textContent = server.model_alias;
  $("model").title = `${server.model_desc}, ${server.build_info}`;
  show();
  const refused = problems.get(current.id);
  if (refused?.status === 401) refused.retry();
}

setTheme(THEMES.includes(storage.get(THEME)) ? storage.get(THEME) : "system");
setNav(false);
show();
connect();
focusPrompt();
