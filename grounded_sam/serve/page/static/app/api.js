// Requests to the server. Errors are its own sentences.

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

const RETRIES = 20;

async function call(method, path, body, signal) {
  const isForm = body instanceof FormData;
  const headers = body === undefined || isForm ? {} : { "Content-Type": "application/json" };
  const content = body === undefined || isForm ? body : JSON.stringify(body);
  for (let attempt = 0; ; attempt++) {
    let answer;
    try {
      answer = await fetch(path, { method, headers, body: content, signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The server cannot be reached; is grounded-sam-serve still running?", 0);
    }
    if (answer.ok) return answer.status === 204 ? null : answer.json();
    if ([429, 503].includes(answer.status) && attempt < RETRIES) {
      const seconds = Number(answer.headers.get("Retry-After")) || 1;
      await new Promise((done) => setTimeout(done, 1000 * Math.min(seconds, 10)));
      continue;
    }
    const reason = await answer.json().catch(() => ({}));
    throw new ApiError(sentence(reason.error || `${method} ${path}: status ${answer.status}`), answer.status);
  }
}

function sentence(text) {
  return /^[a-z]+ /.test(text) ? text.slice(0, 1).toUpperCase() + text.slice(1) : text; // names stay as they are
}

const get = (path, signal) => call("GET", path, undefined, signal);
const post = (path, body, signal) => call("POST", path, body, signal);

function query(values) {
  const given = Object.entries(values).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return new URLSearchParams(given).toString();
}

function formOf(file) {
  const form = new FormData();
  form.append("file", file, file.name || "camera.png");
  return form;
}

const part = encodeURIComponent;

export const about = () => get("/v1/about");
/** Send an image: a File, or the path of an example. */
export const addPicture = (given) => post("/v1/pictures", typeof given === "string" ? { path: given } : formOf(given));
export const pictureUrl = (id) => `/v1/pictures/${part(id)}`;
export const predict = (body, signal) => post("/v1/predict", body, signal);
export const select = (body, signal) => post("/v1/select", body, signal);
export const openSession = (picture) => post("/v1/sessions", { picture });
export const closeSession = (id) => call("DELETE", `/v1/sessions/${part(id)}`);
export const segment = (session, prompts) => post(`/v1/sessions/${part(session)}/segment`, { prompts });

export const addVideo = (given) => post("/v1/videos", typeof given === "string" ? { path: given } : formOf(given));
export const frameUrl = (video, number) => `/v1/videos/${part(video)}/frames/${number}`;
export const track = (video, body) => post(`/v1/videos/${part(video)}/track`, body);
export const cancelJob = (job) => call("DELETE", `/v1/jobs/${part(job)}`);

/** Read the lines of a job as they come; return a function that stops reading. */
export function readJob(job, onLine, onEnd) {
  const source = new EventSource(`/v1/jobs/${part(job)}/events`);
  source.onmessage = (event) => onLine(JSON.parse(event.data));
  source.addEventListener("end", (event) => {
    source.close();
    onEnd(JSON.parse(event.data));
  });
  source.onerror = () => {
    if (source.readyState !== EventSource.CLOSED) return; // it connects again by itself
    onEnd({ state: "failed", error: "The connection to the server has ended." });
  };
  return () => source.close();
}

const store = (name) => `/v1/stores/${part(name)}`;
export const storedPictures = (name, filter, signal) => get(`${store(name)}/pictures?${query(filter)}`, signal);
export const storedPicture = (name, id) => get(`${store(name)}/pictures/${part(id)}`);
export const thumbnailUrl = (name, id, side) => `${store(name)}/pictures/${part(id)}/thumbnail?max_side=${side}`;
export const storedImageUrl = (name, id) => `${store(name)}/pictures/${part(id)}/image`;
export const openStored = (name, id) => post(`${store(name)}/pictures/${part(id)}/open`);
export const storedVideos = (name) => get(`${store(name)}/videos`);
export const edit = (name, edits, author) => post(`${store(name)}/edits`, { edits, author });
export const undo = (name, batch, author) => post(`${store(name)}/undo`, { batch, author });

const sweepPath = (name) => `/v1/sweeps/${part(name)}`;
export const sweep = (name) => get(sweepPath(name));
export const compare = (name, a, b, cursor, signal) =>
  get(`${sweepPath(name)}/compare?${query({ a, b, cursor })}`, signal);
export const comparedUrl = (name, job, picture) => `${sweepPath(name)}/image?${query({ job, name: picture })}`;
