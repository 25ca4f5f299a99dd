"use strict";
// Follows what the server says without a reload.  Every page works without this file too.

(() => {
  const all = (selector, work) => document.querySelectorAll(selector).forEach(work);
  const busy = new Set(["starting", "stopping", "suspending", "removing"]);

  // A form is sent once, however often its button is pressed.
  all("form[data-once]", (form) => form.addEventListener("submit", (event) => {
    if (form.dataset.sent) { event.preventDefault(); return; }
    form.dataset.sent = "yes";
    form.querySelectorAll("button").forEach((button) => button.setAttribute("aria-disabled", "true"));
  }));
  // Copies the content of a field; without a secure context there is only the old way.
  all("[data-copy]", (button) => {
    const field = document.getElementById(button.dataset.copy);
    button.hidden = false;
    button.addEventListener("click", async () => {
      field.select();
      let copied = true;
      try { await navigator.clipboard.writeText(field.value); } catch { copied = document.execCommand("copy"); }
      button.textContent = copied ? "Copied" : "Select and copy it";
    });
  });
  // A page that Back takes from memory may belong to a session that has ended, and its forms were sent.
  addEventListener("pageshow", (event) => { if (event.persisted) location.replace(location.pathname + location.search); });

  // The fragment of an address is not sent to the server: it is added to what leads back to the app.
  const fragment = location.hash;
  addEventListener("submit", ({ target: { elements: { next } } }) => { if (next) next.value = following(next.value); });
  all("a[data-next]", (link) => { link.href = following(link.getAttribute("href")); });

  function following(target) { return target.includes("#") ? target : target + fragment; }

  async function states(url) {
    const response = await fetch(url, { headers: { Accept: "application/json" } });
    if (response.status === 401) { location.reload(); }
    if (!response.ok) throw new Error(String(response.status));
    return (await response.json()).agents;
  }

  function seconds(since) {
    const count = Math.max(0, Math.round((Date.now() - since) / 1000));
    return count < 60 ? `${count} s` : `${Math.floor(count / 60)} min ${count % 60} s`;
  }

  // The waiting page: stages as they come, then the app.
  function wait(card) {
    const { agent, target } = card.dataset;
    const list = card.querySelector("[data-stages]"), bar = card.querySelector("[data-progress]");
    const begun = Date.now();
    let leaving = false, polling = 0;

    function leave() {
      if (leaving) return;
      leaving = true;
      clearInterval(clock);
      clearTimeout(polling);
      // A page that was replaced at once would flicker, and one that comes back must not spin.
      setTimeout(() => {
        // With a fragment, replacing an address by itself would load nothing.
        if (target === location.pathname + location.search) location.reload(); else location.replace(following(target));
      }, Date.now() - begun < 400 ? 400 : 0);
    }

    function show(stage, detail, fraction) {
      let now = list.querySelector(".now");
      const title = now.querySelector("[data-stage]");
      if (stage && stage !== title.textContent) {
        const next = now.cloneNode(false);
        now.className = "done";
        now.querySelector("small")?.remove();
        const text = document.createElement("span");
        text.dataset.stage = "";
        text.textContent = stage;
        next.append(text);
        list.append(next);
        while (list.children.length > 8) list.firstElementChild.remove();
        now = next;
      }
      let small = now.querySelector("small");
      if (detail && !small) {
        small = document.createElement("small");
        now.append(" ", small);
      }
      if (small) small.textContent = detail || "";
      if (typeof fraction === "number") bar.value = fraction; else bar.removeAttribute("value");
    }

    function apply(state) {
      if (state.state === "running" || state.state === "failed" || state.failed) leave();
      else show(state.stage, state.detail, state.fraction);
    }

    async function ask(pause) {
      try {
        const mine = (await states(card.dataset.status)).find((each) => each.name === agent);
        if (mine) { apply(mine); pause = 1000; } else leave();
      } catch { pause = Math.min(pause * 2, 10000); }
      if (!leaving) polling = setTimeout(() => ask(pause), pause);
    }

    const clock = setInterval(() => { card.querySelector("[data-time]").textContent = `For ${seconds(begun)} so far`; }, 1000);
    const source = new EventSource(`${card.dataset.events}?agent=${encodeURIComponent(agent)}`);
    const onChange = (event) => { try { apply(JSON.parse(event.data)); } catch { /* another format */ } };
    for (const name of ["message", "agent", "state"]) source.addEventListener(name, onChange);
    source.addEventListener("error", () => {
      // The browser tries again by itself unless the answer was no stream; meanwhile the status says the same.
      if (!polling && !leaving) polling = setTimeout(() => ask(1000), source.readyState === EventSource.CLOSED ? 0 : 1500);
    });
    addEventListener("pagehide", () => source.close());
  }
  all("[data-wait]", wait);

  // Before another app is opened or another person goes on: all apps share one address, and what their open pages send
  // would arrive there.  `ask` waits for the user if there are such pages, `replace` does not.
  async function others(card, replacement) {
    const registration = await navigator.serviceWorker.register(card.dataset.worker, { scope: "/" });
    const worker = registration.installing || registration.waiting || registration.active;
    await new Promise((done) => {
      const look = () => { if (worker.state === "activated") done(); };
      worker.addEventListener("statechange", look);
      look();
    });
    const channel = new MessageChannel();
    const count = new Promise((done) => { channel.port1.onmessage = ({ data }) => done(data); });
    worker.postMessage({ replacement }, [channel.port2]);
    const left = await count;
    await registration.unregister();
    return left;
  }

  async function replace(card, show) {
    const form = card.querySelector("form"), button = form.querySelector("button");
    async function work(event) {
      event?.preventDefault();
      button.removeEventListener("click", work);
      if (await others(card, card.dataset.replacement) === 0) form.submit(); else show("left");
    }
    show("");
    if (card.dataset.pages === "replace") { await work(); return; }
    if (await others(card) === 0) { form.submit(); return; }
    button.addEventListener("click", work);
    show("open");
  }
  // Only over HTTPS and on localhost; elsewhere, and if it fails, the page says what to do by hand.
  if (navigator.serviceWorker) all("[data-pages]", (card) => {
    const show = (when) => card.querySelectorAll("[data-when]").forEach((part) => { part.hidden = part.dataset.when !== when; });
    replace(card, show).catch(() => show("hand"));
  });

  // The failed page and the list of apps: reload when a state has changed, but not while the browser is on its way to
  // another page: a reload would cancel that.
  let leaving = false;
  addEventListener("beforeunload", () => { leaving = true; });
  function watch(expected, url, pause) {
    async function look() {
      let changed = false;
      if (!document.hidden) {
        try {
          const found = new Map((await states(url)).map((each) => [each.name, each.state]));
          changed = found.size !== expected.size && expected.full;
          for (const [name, state] of expected.states) changed ||= found.get(name) !== state;
        } catch { /* asked again below */ }
      }
      const typing = document.activeElement?.matches("input, textarea");
      if (changed && !typing && !leaving) location.reload(); else setTimeout(look, pause);
    }
    setTimeout(look, pause);
  }
  all("[data-apps]", (list) => {
    const items = [...list.querySelectorAll("[data-agent]")].map((item) => [item.dataset.agent, item.dataset.state]);
    const moving = items.some(([, state]) => busy.has(state));
    watch({ states: items, size: items.length, full: true }, list.dataset.status, moving ? 1000 : 5000);
  });
  all("[data-failed]", (card) => watch({ states: [[card.dataset.agent, "failed"]] }, card.dataset.status, 5000));
})();
