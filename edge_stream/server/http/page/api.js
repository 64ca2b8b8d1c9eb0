// The server: its facts, and answers as a stream of chunks. Errors are one readable sentence.

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

// GET /props. Raises ServerError.
export async function props(key) {
  return (await request("props", key, {})).json();
}

// POST /v1/chat/completions: yields the parsed chunks. Raises ServerError, or AbortError where signal says so.
export async function* answer(body, { key, conversation, signal }) {
  const response = await request("v1/chat/completions", key, {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Conversation": conversation },
    body: JSON.stringify({ ...body, stream: true, timings_per_token: true }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const lines = (buffer + value).split(/\r?\n/);
      buffer = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue; // comments keep the connection alive
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ServerError(sentence(chunk.error.message), chunk.error.code);
        yield chunk;
      }
    }
  } catch (error) {
    if (error instanceof ServerError || error.name === "AbortError") throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new ServerError("The connection ended before the answer was complete.");
}

async function request(path, key, options) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached: is edge-stream serve still running?");
  }
  if (response.ok) return response;
  let message = `the server answered with status ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // not one of the server's own errors
  }
  const wait = response.headers.get("Retry-After");
  throw new ServerError(sentence(wait ? `${message} (try again in ${wait} s)` : message), response.status);
}

function sentence(text) {
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
}
