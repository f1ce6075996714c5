// A checkpoint's way: choose, upload, watch the job, hand over its report.

import { Problem, ask, askJson, isAbort, upload, watch } from "./api.js";
import { fillSelect, seconds, size } from "./words.js";

const $ = (id) => document.getElementById(id);
const CARRIED = "static/assets/small_sam.pth";
const UNTOUCHED = 2 ** 40; // elements: no tensor has as many, so birkhoff stores every one as it is
const AMOUNTS = { target_ratio: "Times smaller", target_mb: "MB", max_error: "Relative error of each tensor, at most" };
const STAGES = {
  queued: "Waiting for a worker",
  starting: "Starting",
  reading: "Reading the checkpoint",
  measuring: "Measuring where the masks feel errors",
  planning: "Planning the bits",
  encoding: "Encoding the tensors",
  comparing: "Comparing with the original",
  writing: "Writing",
  verifying: "Verifying",
  cancelling: "Cancelling",
};
const ENDINGS = { succeeded: "Done", failed: "Failed", cancelled: "Cancelled" };

/** `done(job)` is called with a job that has succeeded. */
export class Press {
  #file = null;
  #control = null;
  #job = null;
  #busy = false; // with a job that was started here
  #said = "";

  constructor(done) {
    this.done = done;
    $("checkpoint").addEventListener("change", ({ target }) => target.files[0] && this.take(target.files[0]));
    $("carried").addEventListener("click", () => this.#takeCarried());
    $("codec").addEventListener("change", () => this.#options());
    $("goal").addEventListener("change", () => this.#options());
    $("compress-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#start("compress");
    });
    $("plan").addEventListener("click", () => this.#start("plan"));
    $("cancel").addEventListener("click", () => this.#cancel());
    this.#options();
  }

  setVariants(variants) {
    const [own] = $("variant").options; // to be found out; the rest may be there from before a change of key
    fillSelect($("variant"), [[own.value, own.textContent], ...variants.map(({ id, title }) => [id, title])]);
  }

  /** Take a checkpoint that was chosen or dropped. */
  take(file) {
    this.#file = file;
    $("checkpoint-name").textContent = `${file.name}, ${size(file.size)}`;
    this.#options();
  }

  async #takeCarried() {
    try {
      this.take(new File([await (await ask(CARRIED)).blob()], CARRIED.split("/").pop()));
    } catch (error) {
      this.#fail(error);
    }
  }

  #options() {
    const codec = $("codec").value, goal = $("goal").value;
    const allocated = codec === "lattice" || codec === "orbit";
    $("goal-field").hidden = $("policy-field").hidden = !allocated;
    $("amount-field").hidden = !allocated || !(goal in AMOUNTS);
    $("amount-label").textContent = AMOUNTS[goal] ?? "Amount";
    $("start").disabled = !this.#file || this.#busy;
    $("plan").disabled = $("start").disabled || !allocated;
    if (this.#file) $("name").placeholder = this.#suggestion();
  }

  #suggestion() {
    const [codec, goal] = [$("codec").value, $("goal").value.replace("preset:", "")];
    const stem = this.#file.name.replace(/\.[^.]*$/, "").replaceAll(/[^A-Za-z0-9._-]+/g, "-").replace(/^[^A-Za-z0-9]+/, "");
    const amount = goal in AMOUNTS ? { target_ratio: "x", target_mb: "MB", max_error: "e" }[goal] : "";
    const ending = codec === "original" || codec === "birkhoff" ? codec : amount ? `${codec}-${$("amount").value}${amount}` : `${codec}-${goal}`;
    return `${(stem || "model").slice(0, 40)}-${ending}`;
  }

  #form(dry) {
    const codec = $("codec").value, goal = $("goal").value, form = new FormData();
    form.append("codec", codec === "original" ? "birkhoff" : codec);
    if (codec === "original") form.append("options", JSON.stringify({ min_elements: UNTOUCHED }));
    if (codec === "lattice" || codec === "orbit") {
      const [name, preset] = goal.split(":");
      form.append(name, preset ?? $("amount").value);
      form.append("policy", $("policy").value);
    }
    if (!dry) form.append("fidelity", codec !== "original" && $("fidelity").checked);
    form.append("name", $("name").value.trim() || this.#suggestion());
    if ($("variant").value) form.append("variant", $("variant").value);
    if ($("decoder").files[0]) form.append("decoder", $("decoder").files[0]);
    form.append("file", this.#file); // last, so that a wrong field is found before gigabytes are sent
    return form;
  }

  async #start(what) {
    if (!this.#file || this.#busy) return;
    this.#fail(null);
    this.#control?.abort(); // looks no longer at what was going on before
    const control = (this.#control = new AbortController());
    this.#job = { id: null };
    this.#busy = true;
    this.#show(`Uploading ${this.#file.name}`);
    try {
      const job = await upload(what, this.#form(what === "plan"), {
        signal: control.signal,
        told: (sent, total) => this.#tell(sent / total, `Uploading ${size(sent)} of ${size(total)}`),
      });
      await this.#watch(job, control);
    } catch (error) {
      $("job").hidden = true;
      this.#fail(error);
    } finally {
      this.#busy = false;
      this.#options();
    }
  }

  /** Watch a job that is at work already, as after a reload. */
  async follow(job) {
    if (this.#busy) return;
    this.#control?.abort();
    try {
      await this.#watch(job, (this.#control = new AbortController()));
    } catch (error) {
      this.#fail(error);
    }
  }

  async #watch(job, control) {
    this.#job = job;
    this.#show(`Compressing to ${job.name}`);
    const waits = ({ message }, wait) => this.#tell(job.progress, message, ` (asking again in ${wait / 1000} s)`);
    for await (const state of watch(job.id, control.signal, waits)) {
      job = state;
      const eta = job.eta_s == null ? "" : `, about ${seconds(job.eta_s)} left`;
      this.#tell(job.progress, STAGES[job.stage] ?? ENDINGS[job.state] ?? job.stage, job.state === "running" ? eta : "");
    }
    if (["queued", "running"].includes(job.state)) job = await askJson(`jobs/${job.id}`, { signal: control.signal });
    $("cancel").hidden = true;
    this.#tell(job.state === "succeeded" ? 1 : job.progress, ENDINGS[job.state]);
    if (job.state === "failed") throw new Problem(0, job.error?.code, job.error?.message ?? "The job failed.");
    if (job.state === "succeeded") await this.done(job);
  }

  async #cancel() {
    $("cancel").disabled = true;
    if (!this.#job?.id) return this.#control.abort(); // still uploading
    try {
      await ask(`jobs/${this.#job.id}`, { method: "DELETE" });
    } catch (error) {
      $("cancel").disabled = false; // it goes on, and can be cancelled later
      this.#fail(error);
    }
  }

  #show(title) {
    $("job").hidden = $("cancel").disabled = $("cancel").hidden = false;
    $("job-title").textContent = title;
    this.#tell(0, "");
    this.#options();
  }

  #tell(progress, stage, eta = "") {
    $("job-progress").value = progress;
    $("job-stage").textContent = stage;
    $("job-eta").textContent = eta;
    // Read out when the stage changes, and not with every percent.
    const said = stage.replace(/ [\d.]+ .*/, "");
    if (said && said !== this.#said) $("job-said").textContent = this.#said = said;
  }

  #fail(error) {
    if (isAbort(error)) return;
    if (error && !(error instanceof Problem)) console.error(error);
    if (error?.code === "unauthorized") $("key-box").open = true;
    $("job-problem").hidden = !error;
    $("job-problem").textContent = error?.message ?? "";
  }
}
