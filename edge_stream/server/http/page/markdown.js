// Markdown as DOM nodes. Text of a model only ever becomes text nodes; no HTML is parsed.

import { h, copyButton } from "./dom.js";

// What is deeper or longer is shown as it is written: time stays linear whatever a model writes.
const MAX_DEPTH = 8; // of quotes, lists and emphasis inside each other
const MAX_LENGTH = 10_000; // characters of a line, or of a paragraph

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:[ \t]+(.*)|)$/;

// A view of one text that grows: every block but the last is final, so only the last is made anew.
export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.text = "";
    this.done = 0; // characters of final blocks
    this.tail = []; // nodes of the last block
  }

  update(text) {
    if (!text.startsWith(this.text)) {
      this.done = 0;
      this.tail = [];
      this.root.replaceChildren();
    }
    this.text = text;
    const blocks = split(text.slice(this.done));
    const last = blocks.pop();
    if (!last) return;
    if (blocks.length === 0 && last.code !== undefined && grow(this.tail[0], last)) return;
    for (const node of this.tail) node.remove();
    for (const block of blocks) this.root.append(...render(block, 0));
    this.done += last.start;
    this.tail = render(last, 0);
    this.root.append(...this.tail);
  }
}

// Add to a code block in place, so that its button can be pressed and its text selected meanwhile.
function grow(node, block) {
  const code = node?.querySelector?.(":scope > pre > code");
  if (!code || node.dataset.info !== block.info || !block.code.startsWith(code.textContent)) return false;
  code.firstChild.appendData(block.code.slice(code.textContent.length));
  return true;
}

// Cut text into blocks: {start, lines} and what the kind needs. start counts characters.
function split(text) {
  const lines = text.split("\n");
  const blocks = [];
  let i = 0;
  let start = 0;
  const take = (block, n) => {
    blocks.push({ start, ...block });
    for (const end = i + n; i < end && i < lines.length; i++) start += lines[i].length + 1;
  };
  while (i < lines.length) {
    const line = lines[i];
    let match;
    if (!line.trim()) {
      start += line.length + 1;
      i++;
    } else if (line.length > MAX_LENGTH) {
      take({ text: line }, 1);
    } else if ((match = FENCE.exec(line))) {
      let end = i + 1;
      while (end < lines.length && !closesFence(lines[end], match[1])) end++;
      take({ code: lines.slice(i + 1, end).join("\n"), info: match[2].trim().slice(0, 40) }, end - i + 1);
    } else if ((match = HEADING.exec(line))) {
      take({ heading: match[1].length, text: match[2].replace(/[ \t]+#+[ \t]*$/, "") }, 1);
    } else if (RULE.test(line)) {
      take({ rule: true }, 1);
    } else if (QUOTE.test(line)) {
      let end = i + 1;
      while (end < lines.length && (QUOTE.test(lines[end]) || (lines[end].trim() && !begins(lines[end])))) end++;
      take({ quote: lines.slice(i, end).map((l) => l.replace(QUOTE, "")).join("\n") }, end - i);
    } else if (ITEM.test(line)) {
      const end = listEnd(lines, i);
      take({ list: lines.slice(i, end) }, end - i);
    } else if (line.includes("|") && i + 1 < lines.length && isTable(line, lines[i + 1])) {
      let end = i + 2;
      while (end < lines.length && lines[end].includes("|")) end++;
      take({ table: lines.slice(i, end) }, end - i);
    } else {
      let end = i + 1;
      while (end < lines.length && lines[end].trim() && !begins(lines[end])) end++;
      take({ text: lines.slice(i, end).join("\n") }, end - i);
    }
  }
  return blocks;
}

function closesFence(line, opening) {
  const text = line.trim();
  return text.length >= opening.length && text === opening[0].repeat(text.length);
}

function begins(line) {
  if (line.length > MAX_LENGTH) return true;
  return FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || RULE.test(line) || ITEM.test(line);
}

function isTable(head, rule) {
  if (Math.max(head.length, rule.length) > MAX_LENGTH || !/^[ |:-]+$/.test(rule)) return false;
  const columns = cells(rule);
  return columns.every((cell) => /^:?-+:?$/.test(cell)) && cells(head).length === columns.length;
}

// A list goes on over blank lines while what follows is another item or is indented.
function listEnd(lines, begin) {
  let end = begin + 1;
  for (let i = end; i < lines.length; i++) {
    const line = lines[i];
    if (!line.trim()) continue;
    const lazy = lines[i - 1].trim() && !begins(line);
    if (RULE.test(line) || !(ITEM.test(line) || /^ {2,}|^\t/.test(line) || lazy)) break;
    end = i + 1;
  }
  return end;
}

function render(block, depth) {
  if (block.code !== undefined) return [code(block)];
  if (block.heading) return [inlineInto(h(`h${Math.min(6, block.heading + 2)}`, { dir: "auto" }), block.text, 0)];
  if (block.rule) return [h("hr")];
  if (block.quote !== undefined) return [h("blockquote", {}, ...children(block.quote, depth))];
  if (block.list) return lists(block.list, depth);
  if (block.table) return [table(block.table)];
  return [inlineInto(h("p", { dir: "auto" }), block.text, 0)];
}

function children(text, depth) {
  if (depth >= MAX_DEPTH) return [h("p", { dir: "auto" }, text)];
  return split(text).flatMap((block) => render(block, depth + 1));
}

function code({ code: text, info }) {
  const pre = h("pre", { tabIndex: 0, ariaLabel: info ? `${info} code` : "code" }, h("code", {}, text));
  pre.setAttribute("role", "region");
  pre.firstChild.firstChild ?? pre.firstChild.append(document.createTextNode(""));
  const box = h("div", { className: "code" }, h("div", { className: "bar" }, h("span", {}, info)), pre);
  box.dataset.info = info;
  box.firstChild.append(copyButton("Copy code", () => pre.textContent));
  return box;
}

// Items of one indentation; the marker's kind decides whether the list is ordered.
function lists(lines, depth) {
  const out = [];
  let list = null;
  let item = null;
  const close = () => {
    if (!item) return;
    const text = item.join("\n");
    const inner = children(text, depth);
    if (inner[0]?.tagName === "P") inner.splice(0, 1, ...inner[0].childNodes); // without a paragraph's spacing
    list.append(h("li", { dir: "auto" }, ...inner));
    item = null;
  };
  const base = ITEM.exec(lines[0])[1].length;
  let indent = 0;
  for (const line of lines) {
    const match = ITEM.exec(line);
    if (match && match[1].length < Math.max(indent, base + 2)) {
      close();
      const ordered = /\d/.test(match[2]);
      if (!list || (list.tagName === "OL") !== ordered) {
        list = h(ordered ? "ol" : "ul");
        if (ordered) list.start = parseInt(match[2], 10);
        out.push(list);
      }
      item = [match[3] ?? ""];
      indent = match[1].length + match[2].length + 1;
    } else {
      const text = line.replace(/^\t/, "    ");
      item.push(text.slice(Math.min(indent, text.length - text.trimStart().length)));
    }
  }
  close();
  return out;
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table(lines) {
  const aligns = cells(lines[1]).map((c) => (c.endsWith(":") ? (c.startsWith(":") ? "center" : "end") : "start"));
  const row = (line, tag) =>
    h("tr", {}, ...aligns.map((align, i) => inlineInto(h(tag, { className: align, dir: "auto" }), cells(line)[i] ?? "", 0)));
  const body = h("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")));
  const box = h("div", { className: "table", tabIndex: 0, ariaLabel: "table" }, h("table", {}, h("thead", {}, row(lines[0], "th")), body));
  box.setAttribute("role", "region");
  return box;
}

const LINK = /!?\[([^[\]\n]*)\]\( {0,3}<?([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?: {1,3}"[^"\n]*")? {0,3}\)/y;
const BARE = /https?:\/\/[^\s<>"'`\\^{|}]+/y;
const MARKS = { "**": "strong", __: "strong", "*": "em", _: "em", "~~": "del" };

// Only http and https, so that no text of a model can run anything.
export function safeUrl(text) {
  if (!/^https?:\/\//i.test(text)) return null;
  try {
    return new URL(text).href;
  } catch {
    return null;
  }
}

function inlineInto(parent, text, depth) {
  if (text.length > MAX_LENGTH) {
    parent.append(text);
    return parent;
  }
  const absent = new Set(); // marks that are closed nowhere further on: searched for once, so that time is linear
  let plain = "";
  let i = 0;
  const flush = () => {
    if (plain) parent.append(plain);
    plain = "";
  };
  const add = (node, end) => {
    flush();
    parent.append(node);
    i = end;
  };
  while (i < text.length) {
    const c = text[i];
    if (c === "\\" && /[!-/:-@[-`{-~]/.test(text[i + 1] ?? "")) {
      plain += text[i + 1];
      i += 2;
    } else if (c === "\\" && text[i + 1] === "\n") {
      add(h("br"), i + 2);
    } else if (c === "\n") {
      const hard = /  $/.test(plain);
      plain = plain.trimEnd();
      if (hard) add(h("br"), i + 1);
      else plain += text[i++];
    } else if (c === "`") {
      const ticks = /`+/y;
      ticks.lastIndex = i;
      const run = ticks.exec(text)[0];
      const end = absent.has(run) ? -1 : closingTicks(text, i + run.length, run);
      if (end < 0) {
        absent.add(run);
        plain += run;
        i += run.length;
      } else {
        const inner = text.slice(i + run.length, end).replaceAll("\n", " ");
        add(h("code", {}, inner.trim() ? inner.replace(/^ (.*) $/, "$1") : inner), end + run.length);
      }
    } else if (c === "[" || (c === "!" && text[i + 1] === "[")) {
      LINK.lastIndex = i;
      const match = LINK.exec(text);
      const url = match && safeUrl(match[2]);
      if (url) add(link(url, match[1] || url, depth), LINK.lastIndex);
      else plain += text[i++];
    } else if ((c === "h" && !/\w/.test(text[i - 1] ?? "")) || (c === "<" && text[i + 1] === "h")) {
      BARE.lastIndex = c === "<" ? i + 1 : i;
      let found = BARE.exec(text)?.[0];
      const end = BARE.lastIndex;
      const angled = c === "<" && text[end] === ">";
      if (!angled) found = c === "h" && found?.replace(/[.,:;!?*_~]+$|\)+[.,:;!?]*$/, "");
      const url = found && safeUrl(found);
      if (url) add(link(url, found, MAX_DEPTH), angled ? end + 1 : i + found.length);
      else plain += text[i++];
    } else if (c === "*" || c === "_" || c === "~") {
      const mark = text[i + 1] === c ? c + c : c;
      const end = MARKS[mark] && depth < MAX_DEPTH && opens(text, i, mark) ? closing(text, i, mark, absent) : -1;
      if (end < 0) {
        plain += mark;
        i += mark.length;
      } else {
        add(inlineInto(h(MARKS[mark]), text.slice(i + mark.length, end), depth + 1), end + mark.length);
      }
    } else {
      plain += c;
      i++;
    }
  }
  flush();
  return parent;
}

function closingTicks(text, from, run) {
  for (let end = text.indexOf(run, from); end >= 0; end = text.indexOf(run, end + 1)) {
    if (text[end - 1] !== "`" && text[end + run.length] !== "`") return end;
    while (text[end] === "`") end++;
  }
  return -1;
}

function opens(text, i, mark) {
  return /\S/.test(text[i + mark.length] ?? " ") && !(mark[0] === "_" && /\w/.test(text[i - 1] ?? ""));
}

function closing(text, i, mark, absent) {
  if (absent.has(mark)) return -1;
  for (let end = text.indexOf(mark, i + mark.length + 1); end >= 0; end = text.indexOf(mark, end + 1)) {
    const before = text[end - 1];
    const after = text[end + mark.length] ?? "";
    if (/\s/.test(before) || before === "\\") continue;
    if (mark.length === 1 && (after === mark || before === mark)) continue; // part of a double one
    if (mark.length === 2 && after === mark[0]) end++; // ***both***: the inner one closes first
    if (mark[0] === "_" && /\w/.test(after)) continue;
    return end;
  }
  absent.add(mark);
  return -1;
}

function link(url, label, depth) {
  const a = h("a", { href: url, target: "_blank", rel: "noopener noreferrer", title: url });
  return depth < MAX_DEPTH ? inlineInto(a, label, MAX_DEPTH) : (a.append(label), a);
}
