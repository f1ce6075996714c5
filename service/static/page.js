// Puts the sections together: models, key, files that are dropped or pasted.

import { askJson, key } from "./api.js";
import { Press } from "./compressing.js";
import { showReport } from "./report.js";
import { Desk } from "./segmenting.js";
import { fillSelect, modelTitle } from "./words.js";

const $ = (id) => document.getElementById(id);
const CHECKPOINT = /\.(pth|pt|safetensors)$/i;

const desk = new Desk(reload);
const press = new Press(finished);
let reported = null; // what the report is of

async function loadModels() {
  const { models } = await askJson("models");
  desk.setModels(models);
  fillSelect($("report-model"), models.map((model) => [model.id, modelTitle(model)]));
  await loadReport();
}

/** Take the models anew, as one that was listed is gone; if the new list names such a model too, that is not pursued. */
async function reload() {
  try {
    await loadModels();
  } catch (error) {
    if (error.code !== "unknown_model") desk.fail(error);
  }
}

async function loadReport() {
  const model = desk.models.find(({ id }) => id === $("report-model").value);
  if (!model || model.artifact_sha256 === reported) return;
  const { report } = await askJson(`models/${encodeURIComponent(model.id)}`);
  if ($("report-model").value !== model.id) return; // another is chosen by now
  reported = model.artifact_sha256;
  showReport($("report-body"), report, model.id);
}

async function finished(job) {
  if (!job.result.model) {
    reported = null;
    showReport($("report-body"), job.result, `the plan for ${job.name}`);
  } else {
    const { models } = await askJson("models");
    desk.setModels(models);
    fillSelect($("report-model"), models.map((model) => [model.id, modelTitle(model)]), job.result.model);
    await loadReport();
  }
  $("report-title").focus();
}

/** What needs a key is asked for when there is one; what the key does not open is left out. */
async function start() {
  desk.fail(null);
  try {
    await loadModels();
    press.setVariants((await askJson("variants")).variants);
  } catch (error) {
    return desk.fail(error);
  }
  try {
    const { jobs } = await askJson("jobs?limit=20");
    const job = jobs.find(({ state }) => state === "queued" || state === "running");
    if (job) press.follow(job);
  } catch (error) {
    if (error.code !== "forbidden" && error.code !== "unavailable") desk.fail(error);
  }
}

function take(files) {
  const file = [...files].find(Boolean);
  if (!file) return;
  if (CHECKPOINT.test(file.name)) {
    press.take(file);
    $("compress").scrollIntoView();
  } else desk.open(file);
}

addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("dropping"));
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  take(event.dataTransfer.files);
});
addEventListener("paste", (event) => take(event.clipboardData.files));
$("report-model").addEventListener("change", () => loadReport().catch((error) => desk.fail(error)));
$("key").value = key.get();
$("key").addEventListener("change", () => {
  key.set($("key").value.trim());
  start();
});
start();
