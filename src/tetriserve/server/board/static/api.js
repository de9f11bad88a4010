// Calls to the server: with the user's key where one is needed, and server-sent events as they come.

const KEY = "tetriserve-key";
const dialog = document.getElementById("key-dialog");
let asking = null;

/** The network failed, or the server went away. */
export class Unreachable extends Error {}

/** `fetch`; a 401 asks the user for a key and tries again. Throws `Unreachable`. */
export async function call(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const headers = { ...options.headers, ...(key === null ? {} : { Authorization: `Bearer ${key}` }) };
    const response = await reaching(fetch(path, { ...options, headers }));
    if (response.status !== 401) return response;
    if (sessionStorage.getItem(KEY) === key) await askForKey(await errorOf(response));
  }
}

export function post(path, body, options = {}) {
  const headers = { "Content-Type": "application/json" };
  return call(path, { ...options, method: "POST", headers, body: JSON.stringify(body) });
}

/** What an answer in OpenAI's error envelope says. */
export async function errorOf(response) {
  const answer = await response.json().catch(() => null);
  return answer?.error?.message ?? `the server answered ${response.status}`;
}

/** The server-sent events of an answer, as {name, data}. Comments are skipped. Throws `Unreachable`. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reaching(reader.read());
    if (done) return;
    text += value;
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) {
      const name = /^event: ?(.*)$/m.exec(event)?.[1] ?? "message";
      const data = /^data: ?(.*)$/m.exec(event)?.[1];
      if (data !== undefined && data !== "[DONE]") yield { name, data: JSON.parse(data) };
    }
  }
}

function reaching(promise) {
  return promise.catch((error) => {
    throw new Unreachable(error.message, { cause: error });
  });
}

function askForKey(reason) {
  asking ??= new Promise((resolve) => {
    document.getElementById("key-reason").textContent = sessionStorage.getItem(KEY) === null ? "" : reason;
    const input = document.getElementById("key");
    input.value = "";
    const form = document.getElementById("key-form");
    form.onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, input.value.trim());
      dialog.close();
    };
    dialog.oncancel = (event) => event.preventDefault(); // without a key there is nothing to see
    dialog.onclose = () => {
      asking = null;
      resolve();
    };
    dialog.showModal();
  });
  return asking;
}
