// Keeps the pool up to date for as long as the page is open, whatever happens to the connection.

import { Unreachable, call, errorOf, eventsOf } from "./api.js";

const SHORTEST_MS = 500;
const LONGEST_MS = 5000;

/** `onState(state, text)` hears whether the page is live. Never returns. */
export async function follow(pool, onState) {
  let pause = SHORTEST_MS;
  for (;;) {
    let reason = "the server is not there; trying again";
    try {
      const response = await call("board/events");
      if (response.ok) {
        for await (const { name, data } of eventsOf(response)) {
          if (name === "snapshot") pool.begin(data);
          else pool.update(data);
          pause = SHORTEST_MS;
          onState(data.status ? "waiting" : "live", data.status ?? "live");
        }
        reason = "connection lost; trying again";
      } else {
        reason = await errorOf(response);
      }
    } catch (error) {
      if (!(error instanceof Unreachable)) throw error;
    }
    onState("waiting", reason);
    await new Promise((resolve) => setTimeout(resolve, pause));
    pause = Math.min(2 * pause, LONGEST_MS);
  }
}
