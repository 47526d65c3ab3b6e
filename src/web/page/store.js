// What this browser keeps: pictures with their requests, and the jobs that are open. In IndexedDB, or else until the
// page is closed.

export const MOST_PICTURES = 200;
export const MOST_BYTES = 300e6;

/**
 * @typedef {{seed: number, blob: Blob | null, url: string | null}} Picture
 * @typedef {{id: string, created: number, request: any, metadata: any, pictures: Picture[], bytes: number}} Entry
 * @typedef {{id: string, created: number, request: any}} OpenJob
 */

const done = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});

async function openDatabase() {
  const opening = indexedDB.open("flux", 1); // throws where a browser has it switched off
  opening.onupgradeneeded = () => {
    opening.result.createObjectStore("entries", { keyPath: "id" });
    opening.result.createObjectStore("jobs", { keyPath: "id" });
  };
  return done(opening);
}

/** The same calls on a Map. */
class Memory {
  #values = new Map();
  async all() { return [...this.#values.values()]; }
  async put(value) { this.#values.set(value.id, value); }
  async remove(id) { this.#values.delete(id); }
  async clear() { this.#values.clear(); }
}

class Table {
  #database;
  #name;
  constructor(database, name) {
    this.#database = database;
    this.#name = name;
  }
  #open(mode) { return this.#database.transaction(this.#name, mode).objectStore(this.#name); }
  all() { return done(this.#open("readonly").getAll()); }
  put(value) { return done(this.#open("readwrite").put(value)); }
  remove(id) { return done(this.#open("readwrite").delete(id)); }
  clear() { return done(this.#open("readwrite").clear()); }
}

const inShort = ({ id, created, pictures, bytes }) => ({ id, created, count: pictures.length, bytes });

/** Entries and open jobs; `onChange` is called when another tab has changed the entries. */
export class Store {
  /** What is kept, the latest first, without the pictures. @type {{id: string, created: number, count: number, bytes: number}[]} */
  #index = [];
  #channel = "BroadcastChannel" in globalThis ? new BroadcastChannel("flux") : null;

  static async open() {
    const store = new Store();
    try {
      const database = await openDatabase();
      database.onversionchange = () => database.close();
      store.entries = new Table(database, "entries");
      store.jobs = new Table(database, "jobs");
      store.lasts = true;
    } catch {
      store.entries = new Memory();
      store.jobs = new Memory();
      store.lasts = false;
    }
    return store;
  }

  set onChange(listener) {
    if (this.#channel) this.#channel.onmessage = listener;
  }

  /** All entries, the latest first. @returns {Promise<Entry[]>} */
  async all() {
    const entries = (await this.entries.all()).sort((a, b) => b.created - a.created);
    this.#index = entries.map(inShort);
    return entries;
  }

  /** Keep an entry, and let the oldest go where there are too many then: their ids. @returns {Promise<string[]>} */
  async put(entry) {
    const others = this.#index.filter(({ id }) => id !== entry.id), gone = [];
    const dropOldest = async () => {
      const { id } = others.pop();
      await this.entries.remove(id);
      gone.push(id);
    };
    for (;;) {
      try {
        await this.entries.put(entry);
        break;
      } catch (error) {
        if (error.name !== "QuotaExceededError" || !others.length) throw error;
        await dropOldest();
      }
    }
    const own = inShort(entry);
    const sum = (name) => others.reduce((total, each) => total + each[name], own[name]);
    while (others.length && (sum("count") > MOST_PICTURES || sum("bytes") > MOST_BYTES)) await dropOldest();
    this.#index = [own, ...others].sort((a, b) => b.created - a.created);
    this.#channel?.postMessage("changed");
    return gone;
  }

  async remove(id) {
    await this.entries.remove(id);
    this.#index = this.#index.filter((each) => each.id !== id);
    this.#channel?.postMessage("changed");
  }

  async clear() {
    await this.entries.clear();
    this.#index = [];
    this.#channel?.postMessage("changed");
  }
}
