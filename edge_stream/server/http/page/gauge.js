// What the server says of a conversation's stream, for people.

import { $ } from "./dom.js";

const number = new Intl.NumberFormat("en");
const count = (n, what) => `${number.format(n)} ${what}${n === 1 ? "" : "s"}`;

// What prefix matching did with the history, in a sentence; "" where that is not known.
function prefixMatch(info) {
  if (!info?.history) return "";
  const read = Math.max(info.n_read ?? 0, info.n_to_read ?? 0);
  const dropped = info.n_messages_dropped;
  const text = {
    new: `New: ${count(read, "token")} read.`,
    continued: `Continued: ${count(read, "new token")} read, ${number.format(info.n_reused)} known.`,
    branched: `Branched at the last common message: ${count(read, "token")} read, ${number.format(info.n_reused)} known.`,
    rebuilt: `Rebuilt: ${count(read, "token")} read again${dropped ? `, without the oldest ${count(dropped, "message")}` : ""}.`,
  }[info.history];
  return (text ?? "") + (info.restored ? " Restored from disk." : "");
}

export function showGauge(info, n_ctx) {
  const { n_past = null, n_cached = 0, n_pinned = 0, tok_per_s: speed } = info ?? {};
  n_ctx = info?.n_ctx ?? n_ctx ?? 0;
  const pinned = Math.min(n_pinned, n_cached);
  $("meter").setAttribute("aria-valuemax", n_ctx || 1);
  $("meter").setAttribute("aria-valuenow", n_cached);
  $("meter").setAttribute("aria-valuetext", `${number.format(n_cached)} of ${count(n_ctx, "token")}`);
  $("meter").title = `${number.format(pinned)} pinned, ${number.format(n_cached - pinned)} newest, of ${count(n_ctx, "token")}`;
  $("meter-pinned").style.width = `${n_ctx ? (100 * pinned) / n_ctx : 0}%`;
  $("meter-window").style.width = `${n_ctx ? (100 * (n_cached - pinned)) / n_ctx : 0}%`;
  $("g-cache").textContent = n_ctx ? `${number.format(n_cached)} / ${number.format(n_ctx)}` : "–";
  $("g-seen").textContent = n_past === null ? "–" : number.format(n_past);
  $("g-speed").textContent = speed > 0 ? (speed < 100 ? speed.toFixed(1) : number.format(Math.round(speed))) : "–";
  $("g-history").textContent = prefixMatch(info);
}
