// Conversations, kept in this browser. Each is a tree of messages: an edit or a new answer is a new branch.
//
// {id, title, created, updated, system, leaf, messages: [{id, parent, role, content, state, info}]}
// leaf: the last message of the branch that is shown. state, of an answer: writing | stop | length | stopped | failed.
// info: what the server said of the stream, with the answer's speed and length.

const PREFIX = "edge-stream/conversation/";
const FORMAT = "edge-stream-conversations";
const STATES = ["stop", "length", "stopped", "failed"];
const HISTORIES = ["new", "continued", "branched", "rebuilt"];

export const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(12)), (b) => b.toString(16).padStart(2, "0")).join("");

export function newConversation() {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, system: "", leaf: null, messages: [] };
}

// The messages from the first one to the leaf.
export function path(conversation) {
  const byId = new Map(conversation.messages.map((m) => [m.id, m]));
  const out = [];
  for (let m = byId.get(conversation.leaf); m; m = byId.get(m.parent)) out.push(m);
  return out.reverse();
}

export function addMessage(conversation, parent, role, content) {
  const message = { id: newId(), parent, role, content };
  conversation.messages.push(message);
  conversation.leaf = message.id;
  return message;
}

export function removeMessage(conversation, message) {
  conversation.messages.splice(conversation.messages.indexOf(message), 1);
  if (conversation.leaf === message.id) conversation.leaf = message.parent;
}

export const siblings = (conversation, message) => conversation.messages.filter((m) => m.parent === message.parent);

// Show the branch that a message belongs to, down to its newest end.
export function choose(conversation, message) {
  let leaf = message;
  for (let next = leaf; next; next = conversation.messages.findLast((m) => m.parent === leaf.id)) leaf = next;
  conversation.leaf = leaf.id;
}

// What the server is sent. Messages of one role in a row go as one: many templates demand that roles take turns.
export function toChat(conversation, messages) {
  const out = conversation.system.trim() ? [{ role: "system", content: conversation.system }] : [];
  for (const { role, content } of messages) {
    if (out.at(-1)?.role === role) out.at(-1).content += `\n\n${content}`;
    else out.push({ role, content });
  }
  return out;
}

// Everything that is kept comes from outside (an older page, a file): only what is understood is taken over.
function checked(raw) {
  if (typeof raw?.id !== "string" || !raw.id || raw.id.length > 100 || !Array.isArray(raw.messages)) return null;
  const ids = new Set();
  const messages = [];
  for (const m of raw.messages) {
    const valid = typeof m?.id === "string" && !ids.has(m.id) && typeof m.content === "string";
    if (!valid || !["user", "assistant"].includes(m.role) || !(m.parent === null || ids.has(m.parent))) return null;
    ids.add(m.id);
    const message = { id: m.id, parent: m.parent, role: m.role, content: m.content };
    if (m.role === "assistant") {
      message.state = STATES.includes(m.state) ? m.state : "stopped";
      message.info = checkedInfo(m.info);
    }
    messages.push(message);
  }
  const text = (value) => (typeof value === "string" ? value : "");
  const time = (value) => (Number.isFinite(value) ? value : Date.now());
  const leaf = ids.has(raw.leaf) ? raw.leaf : (messages.at(-1)?.id ?? null);
  return { id: raw.id, title: text(raw.title), created: time(raw.created), updated: time(raw.updated), system: text(raw.system), leaf, messages };
}

function checkedInfo(raw) {
  const known = ([name, value]) =>
    Number.isFinite(value) || (name === "history" && HISTORIES.includes(value)) || (name === "restored" && value === true) || (name === "recalled" && isRecalled(value));
  return raw && typeof raw === "object" ? Object.fromEntries(Object.entries(raw).filter(known)) : null;
}

function isRecalled(value) {
  return typeof value?.text === "string" && Number.isFinite(value.messages_ago);
}

// All conversations, in memory and in localStorage. onProblem is given a sentence.
export class Store {
  constructor(onProblem) {
    this.onProblem = onProblem;
    this.all = new Map();
    for (const key of storage.keys(PREFIX)) this.reread(key);
  }

  // By the time of their last change, newest first.
  list() {
    return [...this.all.values()].sort((a, b) => b.updated - a.updated);
  }

  put(conversation) {
    this.all.set(conversation.id, conversation);
    const problem = storage.set(PREFIX + conversation.id, JSON.stringify(conversation));
    if (problem && problem !== this.problem) this.onProblem(`${problem} What is new is kept only until this page is closed: export it, or delete conversations.`);
    this.problem = problem;
  }

  remove(conversation) {
    this.all.delete(conversation.id);
    storage.remove(PREFIX + conversation.id);
  }

  // Take over what another tab wrote. Gives the conversation's id, or null if the key is none of ours.
  reread(key) {
    if (!key?.startsWith(PREFIX)) return null;
    const id = key.slice(PREFIX.length);
    let conversation = null;
    try {
      conversation = checked(JSON.parse(storage.get(key)));
    } catch {
      // damaged: it stays where it is and is not shown
    }
    if (conversation?.id === id) this.all.set(id, conversation);
    else this.all.delete(id);
    return id;
  }

  export(conversations) {
    return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
  }

  // Adds conversations of a file; one whose id is taken becomes a copy. Raises Error with a sentence.
  import(text) {
    let data;
    try {
      data = JSON.parse(text);
    } catch {
      throw new Error("The file is not JSON: nothing was imported.");
    }
    if (data?.format !== FORMAT || data.version !== 1 || !Array.isArray(data.conversations)) {
      throw new Error("The file is not an export of this page: nothing was imported.");
    }
    const found = data.conversations.map(checked);
    if (found.includes(null)) throw new Error("The file is damaged: nothing was imported.");
    for (const conversation of found) {
      if (this.all.has(conversation.id)) conversation.id = newId();
      this.put(conversation);
    }
    return found;
  }
}

// localStorage, which may be forbidden or full. set gives a sentence if it failed.
export const storage = {
  get(key) {
    try {
      return localStorage.getItem(key);
    } catch {
      return null;
    }
  },
  set(key, value) {
    try {
      localStorage.setItem(key, value);
      return null;
    } catch (error) {
      return error.name === "QuotaExceededError" ? "The browser's storage is full." : "The browser does not allow this page to store anything.";
    }
  },
  remove(key) {
    try {
      localStorage.removeItem(key);
    } catch {
      // nothing was kept
    }
  },
  keys(prefix) {
    try {
      return Object.keys(localStorage).filter((key) => key.startsWith(prefix));
    } catch {
      return [];
    }
  },
};
