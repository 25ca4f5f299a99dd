"use strict";
// A service worker that counts the open pages of apps in this browser, and replaces them with a page of the portal.
// It handles no requests, and the pages that use it unregister it (portal.js).

const prefix = location.pathname.replace(/static\/[^/]*$/, "");

addEventListener("install", () => skipWaiting());
addEventListener("message", (event) => event.waitUntil(answer(event)));

async function pages() {
  const all = await clients.matchAll({ type: "window", includeUncontrolled: true });
  return all.filter((page) => page.frameType !== "nested" && !new URL(page.url).pathname.startsWith(prefix));
}

async function answer({ data: { replacement }, ports: [port] }) {
  let left = await pages();
  if (replacement) {
    await clients.claim();
    for (const page of left) page.navigate(replacement).catch(() => {});
    // A page that asks its user whether to leave goes late, or never.
    for (let tries = 30; left.length && tries; tries -= 1) {
      await new Promise((done) => { setTimeout(done, 100); });
      left = await pages();
    }
  }
  port.postMessage(left.length);
}
