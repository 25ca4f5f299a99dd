"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function make(name, text, attributes = {}) {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let step = 0;
  while (bytes >= 1024 && step < units.length - 1) { bytes /= 1024; step += 1; }
  return `${bytes < 10 && step ? bytes.toFixed(1) : Math.round(bytes)} ${units[step]}`;
}

function when(seconds) {
  return new Date(seconds * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

function lasted(seconds) {
  const parts = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const at = parts.findIndex(([unit]) => seconds >= unit);
  if (at < 0) return "0 s";
  const [unit, name] = parts[at];
  const first = `${Math.floor(seconds / unit)} ${name}`;
  if (at > 1) return first;
  const [next, nextName] = parts[at + 1];
  return `${first} ${Math.floor((seconds % unit) / next)} ${nextName}`;
}

function problem(text) {
  $("problem").textContent = text;
  $("problem").hidden = !text;
}

async function call(method, path, body) {
  const options = { method, headers: { Accept: "application/json" } };
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  }
  const response = await fetch(path, options);
  if (response.status === 401) { location.reload(); }
  const value = response.status === 204 ? {} : await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(value.error || value.title || `The app answered ${response.status}`);
  return value;
}

const guarded = (work) => async (...values) => {
  try { problem(""); await work(...values); } catch (error) { problem(error.message); }
};

let started = 0, pause = 1000;

function hands(now) {
  const seconds = now.getSeconds(), minutes = now.getMinutes() + seconds / 60, hours = now.getHours() % 12 + minutes / 60;
  // Angles only increase, so that the second hand does not turn back.
  const whole = Math.round(now.getTime() / 1000) - now.getTimezoneOffset() * 60;
  $("second").style.transform = `rotate(${(whole % 86400) * 6}deg)`;
  $("minute").style.transform = `rotate(${minutes * 6}deg)`;
  $("hour").style.transform = `rotate(${hours * 30}deg)`;
}

function clock() {
  const socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/clock`);
  socket.onopen = () => { $("live").dataset.live = "yes"; pause = 1000; };
  socket.onmessage = (event) => {
    const { now, up } = JSON.parse(event.data);
    const time = new Date(now * 1000);
    $("time").textContent = time.toLocaleTimeString();
    $("link").textContent = "Live over a WebSocket";
    $("since").textContent = `It has been running for ${lasted(up)}, since ${when(started || now - up)}.`;
    hands(time);
  };
  socket.onclose = () => {
    $("live").dataset.live = "no";
    $("link").textContent = "The connection is closed";
    pause = Math.min(pause * 2, 30000);
    if (!document.hidden) setTimeout(clock, pause);
    else document.addEventListener("visibilitychange", clock, { once: true });
  };
}

function face() {
  for (let at = 0; at < 12; at += 1) {
    const tick = document.createElementNS(SVG, "line");
    tick.setAttribute("class", "tick");
    tick.setAttribute("y1", "-41");
    tick.setAttribute("y2", at % 3 ? "-39" : "-36");
    tick.setAttribute("transform", `rotate(${at * 30})`);
    $("ticks").append(tick);
  }
}

async function notes() {
  const list = (await call("GET", "/notes")).notes;
  $("notes").replaceChildren(...list.map((note) => {
    const item = make("li"), row = make("div", undefined, { class: "row" });
    const remove = make("button", "Delete", { class: "bare", type: "button", "aria-label": `Delete the note “${note.text.slice(0, 40)}”` });
    remove.addEventListener("click", guarded(async () => { await call("DELETE", `/notes/${note.id}`); await notes(); }));
    row.append(make("span", when(note.created), { class: "quiet" }), remove);
    item.append(make("p", note.text), row);
    return item;
  }));
  $("count").textContent = list.length || "";
  $("no-notes").hidden = list.length > 0;
}

async function files() {
  const list = (await call("GET", "/files")).files;
  $("files").replaceChildren(...list.map((file) => {
    const item = make("li", undefined, { class: "row" }), side = make("span", undefined, { class: "row" });
    const remove = make("button", "Delete", { class: "bare", type: "button", "aria-label": `Delete ${file.name}` });
    const path = `/files/${encodeURIComponent(file.name)}`;
    remove.addEventListener("click", guarded(async () => { await call("DELETE", path); await files(); }));
    side.append(make("span", size(file.size), { class: "quiet" }), remove);
    item.append(make("a", file.name, { href: path, download: "" }), side);
    return item;
  }));
}

function send(file) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("PUT", `/files/${encodeURIComponent(file.name)}`);
    request.upload.onprogress = (event) => { if (event.lengthComputable) $("progress").value = event.loaded / event.total; };
    request.onload = () => {
      if (request.status < 300) return resolve();
      let text = `The app answered ${request.status}`;
      try { text = JSON.parse(request.responseText).error || text; } catch { /* not JSON: the status is enough */ }
      return reject(new Error(text));
    };
    request.onerror = () => reject(new Error(`${file.name} could not be sent`));
    request.send(file);
  });
}

const upload = guarded(async (chosen) => {
  $("progress").hidden = false;
  try {
    for (const file of chosen) { $("progress").value = 0; await send(file); }
  } finally {
    $("progress").hidden = true;
    $("upload").value = "";
    await files();
  }
});

const about = guarded(async () => {
  const facts = await call("GET", "/about");
  started = facts.since;
  $("of").textContent = facts.user ? `of ${facts.user}` : "";
  document.title = facts.user ? `Notebook of ${facts.user}` : "Notebook";
  $("dashboard").href = `${facts.portal}/`;
  $("signout").href = `${facts.portal}/logout`;
  $("free").textContent = `${size(facts.data.free)} free`;
  const rows = { "Signed in": facts.user || "unknown", Process: facts.process.pid, "User id": facts.process.uid,
    Host: facts.process.host, Data: facts.data.directory };
  $("facts").replaceChildren(...Object.entries(rows).flatMap(([key, value]) => [make("dt", key), make("dd", value)]));
  $("headers").replaceChildren(...facts.headers.map(([name, value]) => {
    const row = make("tr");
    row.append(make("td", name), make("td", value));
    return row;
  }));
});

$("write").addEventListener("submit", (event) => {
  event.preventDefault();
  guarded(async () => { await call("POST", "/notes", { text: $("text").value }); $("text").value = ""; await notes(); })();
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); $("write").requestSubmit(); }
});
$("upload").addEventListener("change", () => upload([...$("upload").files]));
for (const kind of ["dragover", "dragleave", "drop"]) {
  $("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") upload([...event.dataTransfer.files]);
  });
}

face();
hands(new Date());
about();
guarded(notes)();
guarded(files)();
clock();
