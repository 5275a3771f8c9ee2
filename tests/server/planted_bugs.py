"""Measure which bugs of workers and of the API the tests find.

    python -m tests.server.planted_bugs [WORDS OF A NAME ...]

Prints for each bug the test that found it. Exits with 1 if one is not found, or if a test fails without a bug.
"""

import sys

from tests.planting import Bug, copied, run_tests, try_all, try_bug

WORKER, RUNNER, WATCHDOG, PLAN_CACHE, CAPACITY = (
    f"engine/worker/{name}.py" for name in ("worker", "job_runner", "watchdog", "plan_cache", "capacity")
)
PREPARATION, BOUNDARY, RENDERER, IN_FLIGHT, GLYPHS, FOLLOWER = (
    "engine/preparation.py",
    "engine/fault_boundary.py",
    "engine/renderer/stage.py",
    "engine/renderer/in_flight.py",
    "models/glm_image/glyphs.py",
    "engine/jobs/follower.py",
)
ABANDONED, ADMISSION, AUTH, GATE, KEYS, MEMORY, LIMITS, TURNS = (
    f"server/admission/{name}.py"
    for name in ("abandoned_jobs", "admission", "auth", "gate", "keys", "memory_budget", "rate_limits", "turns")
)
DEATH, SERVING, SUPERVISOR = (f"server/processes/{name}.py" for name in ("engine_death", "serving", "supervisor"))
JOB_WAIT, OUTCOMES, SUBMISSION, DECODERS = (
    "server/responses/job_wait.py",
    "server/responses/outcomes.py",
    "server/routes/submission.py",
    "server/image_files/decoders.py",
)

IMAGES = "server/image_files/images.py"
COLOURS, IMAGE_ERRORS = "tests/server/test_image_colours.py", "tests/server/test_image_errors.py"

CLAIMS, WORKS, ENDS, FAULTS = (f"tests/engine/test_worker{name}.py" for name in ("_claims", "", "_ends", "_faults"))
STORING, STORE_WORKER = "tests/jobs/test_result_store.py", "tests/engine/test_worker_store.py"
PREPARING, STREAMS = "tests/engine/test_preparation.py", "tests/engine/test_streams.py"
PATIENCE = "tests/jobs/test_waiting.py::test_patience_with_redis_begins_anew_after_each_answer"
ADMITTING, DECODING, DYING, GATING, JOBS_API, KEYING, LIMITING, LIVE, ORDER, STOPPING, SUPERVISING, BUDGET = (
    f"tests/server/test_{name}.py"
    for name in (
        "admission",
        "decoders",
        "engine_death",
        "gate",
        "jobs_api",
        "keys",
        "limits",
        "live_server",
        "order_of_work",
        "stopping",
        "supervisor",
        "memory_budget",
    )
)

BUGS = [
    # claims and leases
    Bug(
        "an engine that gets stuck goes on claiming",
        WORKER,
        "not (self._draining.is_set() or self._watchdog.is_stuck)",
        "not self._draining.is_set()",
        f"{CLAIMS}::test_an_engine_that_gets_stuck_while_it_renews_does_not_claim",
    ),
    Bug(
        "a stuck engine renews before claiming",
        WORKER,
        "        if self._watchdog.is_stuck:\n            return None",
        "        if False:\n            return None",
        f"{CLAIMS}::test_a_stuck_engine_neither_claims_nor_renews",
    ),
    Bug(
        "a stuck engine goes on renewing",
        WORKER,
        "    async def _renew_leases(self) -> None:\n        if self._watchdog.is_stuck:",
        "    async def _renew_leases(self) -> None:\n        if False:",
        f"{CLAIMS}::test_a_stuck_engine_neither_claims_nor_renews",
    ),
    Bug(
        "an outage is forgotten",
        WORKER,
        "            self._redis_was_away = True\n",
        "",
        f"{CLAIMS}::test_leases_are_renewed_before_a_claim",
    ),
    Bug(
        "no renewal before claiming after an outage",
        WORKER,
        "        await self._renew_leases()\n        self._redis_was_away = False",
        "        self._redis_was_away = False",
        f"{CLAIMS}::test_leases_are_renewed_before_a_claim",
    ),
    Bug(
        "no renewal before claiming after a pause",
        WORKER,
        "if self._redis_was_away or time.monotonic() - self._renewed_at > self._settings.lease_s / 2:",
        "if self._redis_was_away:",
        f"{CLAIMS}::test_leases_are_renewed_before_a_claim",
    ),
    Bug(
        "other engines get no time to renew",
        WORKER,
        "                await self._draining.wait()\n",
        "                pass\n",
        f"{CLAIMS}::test_after_an_outage_other_engines_get_time_to_renew",
    ),
    Bug(
        "jobs run beside a suspect",
        WORKER,
        "if any(job.claim.quarantined for job in self._jobs.values()):",
        "if False:",
        f"{CLAIMS}::test_nothing_runs_beside_a_suspect",
    ),
    Bug(
        "running images take no capacity",
        CAPACITY,
        "images=limits.max_images - sum(job.claim.spec.n for job in jobs),",
        "images=limits.max_images,",
        f"{WORKS}::test_jobs_beyond_the_capacity_stay_in_the_queue",
    ),
    Bug(
        "lost claims run on",
        WORKER,
        "            self._drop(_request_id(claim))\n",
        "            pass\n",
        f"{WORKS}::test_a_job_taken_over_by_another_engine_is_dropped",
    ),
    Bug(
        "cancelled jobs run on",
        WORKER,
        "            for job in [job for job in self._jobs.values() if job.claim.job_id == job_id]:",
        "            for job in list[RunningJob]():",
        f"{WORKS}::test_a_cancelled_job_frees_the_engine_at_once",
    ),
    # the end of an engine
    Bug(
        "an engine's drain does not wait for its jobs",
        WORKER,
        "        if self._job_tasks:\n",
        "        if False:\n",
        f"{WORKS}::test_a_drain_finishes_running_jobs_and_claims_no_more",
    ),
    Bug(
        "a second signal changes nothing",
        WORKER,
        "            self._hand_back.set()\n",
        "            pass\n",
        f"{WORKS}::test_a_second_drain_requeues_at_once",
    ),
    Bug(
        "a job handed back at a drain has had a run",
        WORKER,
        "await self._queue.requeue(self._info.id, job.claim)",
        "await self._queue.requeue_all(self._info.id)",
        f"{WORKS}::test_after_the_grace_period_jobs_are_requeued_and_the_run_does_not_count",
    ),
    Bug(
        "an engine that breaks keeps its jobs",
        WORKER,
        "await self._queue.requeue_all(self._info.id, blame)",
        "pass",
        f"{WORKS}::test_a_lost_device_ends_the_worker_and_requeues_its_jobs",
    ),
    Bug(
        "an engine that hangs at its end never exits",
        WORKER,
        "with exit_within(watchdog.STEP_TIMEOUT_S):",
        "with suppress():",
        f"{ENDS}::test_an_exception_in_a_loop_during_a_hang",
    ),
    Bug(
        "one look makes a step stuck",
        WATCHDOG,
        "confirmed = stuck and self._suspected",
        "confirmed = stuck",
        "tests/engine/test_watchdog.py::test_only_a_step_that_is_stuck_at_two_checks_is_confirmed",
    ),
    Bug(
        "a stopped process waits",
        WATCHDOG,
        "min(elapsed_s, TICK_S)",
        "elapsed_s",
        "tests/engine/test_watchdog.py::test_a_process_that_is_stopped_is_not_stuck",
    ),
    Bug(
        "nobody ends an engine whose event loop hangs",
        WORKER,
        "elif self._watchdog.is_loop_stuck:",
        "elif False:",
        f"{ENDS}::test_a_blocked_event_loop",
    ),
    Bug(
        "the watchdog forgets source images",
        WATCHDOG,
        " + spec.source_tokens * CELL**2",
        "",
        "tests/engine/test_watchdog.py::test_a_step_is_stuck_after_its_timeout",
    ),
    # a job's run
    Bug(
        "partial images are not awaited",
        RUNNER,
        "await asyncio.gather(*job.partials)",
        "pass",
        f"{CLAIMS}::test_no_partial_image_comes_after_the_result",
    ),
    Bug(
        "a partial image that is lost fails its job",
        RUNNER,
        '            _log_failure("partial_image_lost", logging.WARNING, error)',
        "            raise error",
        f"{FAULTS}::test_a_failing_partial_image_does_not_fail_its_job",
    ),
    Bug(
        "a cached plan wins over the checkpoint's",
        RUNNER,
        "request.plans = cached | request.plans",
        "request.plans = request.plans | cached",
        f"{CLAIMS}::test_a_plan_of_an_earlier_run_wins_over_a_cached_one",
    ),
    Bug(
        "cached plans serve any source images",
        PLAN_CACHE,
        "self._planner, spec.prompt, source_hashes,",
        "self._planner, spec.prompt, len(source_hashes),",
        "tests/engine/test_plan_cache.py::test_a_plan_is_found_for_the_same_source_images_in_the_same_order",
    ),
    Bug(
        "a refused result is not written again",
        RUNNER,
        "for _ in range(MAX_WRITE_ATTEMPTS):",
        "for _ in range(1):",
        f"{FAULTS}::test_a_result_refused_once_is_written_later",
    ),
    # bounds of a step
    Bug(
        "glyphs are bounded without padding",
        GLYPHS,
        "(len(divided[-1]) + 1) * longest <= BATCH_TOKENS",
        "sum(lengths[i] for i in [*divided[-1], index]) <= BATCH_TOKENS",
        "tests/models/test_glyphs.py::test_no_mix_of_strings_costs_much_more_than_the_largest_honest_one",
    ),
    Bug(
        "long and short strings are padded together",
        GLYPHS,
        "similar = fits_in_one or 2 * lengths[index] > longest",
        "similar = True",
        "tests/models/test_glyphs.py::test_no_mix_of_strings_costs_much_more_than_the_largest_honest_one",
    ),
    Bug(
        "the glyphs of a step are unbounded",
        PREPARATION,
        "            self._tokens_left -= tokens\n",
        "",
        f"{PREPARING}::test_a_step_encodes_a_bounded_number_of_glyphs",
    ),
    Bug(
        "all source images in one step",
        PREPARATION,
        "with_sources[: int(is_due)]",
        "with_sources if is_due else []",
        f"{PREPARING}::test_a_step_encodes_one_source_image_at_most_and_neighbours_go_on",
    ),
    Bug(
        "negative prompts are unbounded",
        RENDERER,
        '    check_quoted_strings("negative_prompt", spec.negative_prompt, spec.quotes)\n',
        "",
        f"{PREPARING}::test_long_texts_are_refused_before_any_model_work",
    ),
    Bug(
        "an image is decoded before its last tick ends",
        IN_FLIGHT,
        '            streams.follow("decoder", "renderer")\n',
        "",
        f"{STREAMS}::test_images_are_read_when_they_are_done_in_any_order_of_the_device",
    ),
    Bug(
        "latents may be freed while they are decoded",
        IN_FLIGHT,
        'streams.keep(tensor, "decoder")',
        "assert tensor is not None",
        f"{STREAMS}::test_images_are_read_when_they_are_done_in_any_order_of_the_device",
    ),
    Bug(
        "pixels are read before they are copied",
        IN_FLIGHT,
        "while self._decodings and self._decodings[0].done.is_reached:",
        "while self._decodings:",
        f"{STREAMS}::test_images_are_read_when_they_are_done_in_any_order_of_the_device",
    ),
    Bug(
        "ticks are launched without end",
        IN_FLIGHT,
        "            tick.ended.wait()\n        return self._streams.mark",
        "            assert tick\n        return self._streams.mark",
        f"{STREAMS}::test_the_host_is_one_tick_ahead_and_decoding_two_behind",
    ),
    Bug(
        "ticks overtake decoding for ever",
        IN_FLIGHT,
        'self._streams.wait_for("renderer", decoding.done)',
        "pass",
        f"{STREAMS}::test_the_host_is_one_tick_ahead_and_decoding_two_behind",
    ),
    Bug(
        "work without signs of life",
        BOUNDARY,
        "        self.beat()\n        try:",
        "        try:",
        "tests/engine/test_fault_boundary.py::test_all_work_is_preceded_by_a_sign_of_life",
    ),
    # the gate
    Bug(
        "the gate does not count exchanges",
        GATE,
        "        self.inside += 1\n",
        "        self.inside += 0\n",
        f"{GATING}::test_a_process_bounds_its_requests_and_answers_probes",
    ),
    Bug(
        "the gate does not count requests",
        GATE,
        "with _counted(self._requests, _EVERYONE):",
        "with _counted(Counter(), _EVERYONE):",
        f"{GATING}::test_a_process_bounds_its_requests_and_answers_probes",
    ),
    Bug(
        "the gate refuses nothing",
        GATE,
        "if self._requests[_EVERYONE] >= self.max_requests:",
        "if False:",
        f"{GATING}::test_a_process_bounds_its_requests_and_answers_probes",
    ),
    Bug(
        "one key fills the gate",
        GATE,
        "self._limited(self._of_owners, owner,",
        "self._limited(Counter(), owner,",
        f"{GATING}::test_a_key_has_half_of_the_places",
    ),
    Bug(
        "all keys share half of the gate",
        AUTH,
        "request_of(caller.owner)",
        'request_of("")',
        f"{GATING}::test_a_key_has_half_of_the_places",
    ),
    Bug(
        "places of the gate are not freed",
        GATE,
        "        counts[name] -= 1\n",
        "",
        f"{GATING}::test_repetitions_of_an_idempotency_key_are_bounded",
    ),
    Bug(
        "a closed gate lets requests in",
        GATE,
        "        if self.closed:\n",
        "        if False:\n",
        f"{LIVE}::test_a_drain_finishes_running_requests",
    ),
    # charges
    Bug(
        "a refused job is not refunded",
        ADMISSION,
        "refusal:\n            await self.refund(charge)\n",
        "refusal:\n",
        f"{LIMITING}::TestAdmission::test_a_job_refused_by_the_queue_is_refunded",
    ),
    Bug(
        "a refund though a job may be queued",
        ADMISSION,
        "            if idempotency is None:\n                self._aband",
        "            await self.refund(charge)\n            if idempotency is None:\n                self._aband",
        f"{LIMITING}::TestAdmission::test_a_job_that_may_be_queued_is_not_refunded",
    ),
    Bug(
        "a refund though a repetition may find the job",
        ADMISSION,
        "            if idempotency is None:\n",
        "            if idempotency:\n                await self.refund(charge)\n            else:\n",
        f"{LIMITING}::TestAdmission::test_a_job_with_an_idempotency_key_is_not_discarded",
    ),
    Bug(
        "a job that others may find is discarded",
        ADMISSION,
        "            if idempotency is None:\n",
        "            if True:\n",
        f"{LIMITING}::TestAdmission::test_a_job_with_an_idempotency_key_is_not_discarded",
    ),
    Bug(
        "a repetition is charged",
        ADMISSION,
        "        if is_attached:\n            await self.refund(charge)\n",
        "",
        f"{LIMITING}::TestAdmission::test_a_repeated_request_is_not_charged",
    ),
    Bug(
        "edits are charged for the smallest image",
        ADMISSION,
        "if spec.pixel_steps > charge.pixel_steps:",
        "if False:",
        f"{ORDER}::test_an_edit_is_charged_for_the_size_of_its_image",
    ),
    Bug(
        "the rest of a charge counts as a request",
        LIMITS,
        "caller = replace(charge.caller, requests_per_minute=None)",
        "caller = charge.caller",
        f"{ORDER}::test_an_edit_is_charged_for_the_size_of_its_image",
    ),
    Bug(
        "the rest of a charge is not refunded",
        LIMITS,
        "if charge.rest is not None:",
        "if False:",
        f"{LIMITING}::test_a_refund_takes_a_later_charge_back_too",
    ),
    Bug(
        "work for a refused job is free",
        LIMITS,
        "keep_request=charge.worked,",
        "keep_request=False,",
        f"{ORDER}::test_a_job_that_is_refused_after_work_keeps_its_request_charged",
    ),
    # waiting
    Bug(
        "patience with Redis is not renewed",
        FOLLOWER,
        "        self._give_up_at = time.monotonic() + left_s + REDIS_OUTAGE_TIMEOUT_S\n",
        "",
        PATIENCE,
    ),
    Bug("patience with Redis ends before the deadline", FOLLOWER, " + left_s + REDIS", " + REDIS", PATIENCE),
    Bug(
        "jobs outlive their clients",
        JOB_WAIT,
        "if was_abandoned and not self.detached:",
        "if False:",
        f"{LIVE}::test_a_disconnect_cancels_the_job",
    ),
    Bug(
        "results of clients that left stay",
        JOB_WAIT,
        "not self._has_ended or isinstance(error, ClientDisconnect)",
        "not self._has_ended",
        f"{LIVE}::test_the_result_is_deleted_if_the_client_disconnects_on_completion",
    ),
    Bug(
        "detached jobs end with a client",
        JOB_WAIT,
        "if was_abandoned and not self.detached:",
        "if was_abandoned:",
        f"{JOBS_API}::TestJobs::test_a_job_goes_on_without_its_client",
    ),
    Bug(
        "ends of detached jobs are not counted",
        JOB_WAIT,
        "            self._outcomes.watch(self.job_id)\n",
        "            pass\n",
        f"{JOBS_API}::TestJobs::test_ends_are_counted",
    ),
    Bug(
        "a discard is not tried again",
        ABANDONED,
        "await retry_while_away(discard, REDIS_OUTAGE_TIMEOUT_S)",
        "await discard()",
        f"{ADMITTING}::test_a_job_queued_without_a_response_is_discarded",
    ),
    # the drain of an API
    Bug(
        "a drain refuses before balancers know",
        SERVING,
        "self._gate_closes_at = now + (self._delay_s if delayed else 0)",
        "self._gate_closes_at = now",
        f"{STOPPING}::TestDrain::test_requests_are_served_until_balancers_know",
    ),
    Bug(
        "a drain never refuses",
        SERVING,
        "        if now >= self._gate_closes_at:\n            self._gate.close()\n",
        "",
        f"{LIVE}::test_a_drain_finishes_running_requests",
    ),
    Bug(
        "a drain cuts requests that run",
        SERVING,
        "not (self._gate.inside or self._has_unsent_bytes())",
        "not self._has_unsent_bytes()",
        f"{LIVE}::test_a_drain_finishes_running_requests",
    ),
    Bug(
        "a drain cuts answers to slow readers",
        SERVING,
        "not (self._gate.inside or self._has_unsent_bytes())",
        "not self._gate.inside",
        f"{STOPPING}::TestDrain::test_bytes_that_no_request_waits_for_are_sent",
    ),
    Bug(
        "a drain waits for ever",
        SERVING,
        "now > self._drain_ends_at or not",
        "not",
        f"{LIVE}::test_the_grace_period_bounds_the_drain",
    ),
    # places for decoding, and memory
    Bug(
        "places for decoding are not freed",
        TURNS,
        "        finally:\n            self._give_back(owner)",
        "        finally:\n            pass",
        f"{DECODING}::TestTurns::test_in_any_order",
    ),
    Bug(
        "one key takes all places for decoding",
        TURNS,
        "if self._taken[owner] < self._per_caller)",
        "if True)",
        f"{DECODING}::TestTurns::test_in_any_order",
    ),
    Bug(
        "a client that left is decoded for",
        DECODERS,
        "            if worker not in self._idle:\n                self._end(worker)",
        "            pass",
        f"{DECODING}::test_a_client_that_leaves_gives_up_its_place",
    ),
    Bug(
        "memory is not counted",
        MEMORY,
        "        self.in_use += new - old\n",
        "",
        f"{BUDGET}::test_the_sum_is_exact_and_bounded",
    ),
    Bug(
        "memory is not released",
        MEMORY,
        "        finally:\n            held.release()",
        "        finally:\n            pass",
        f"{BUDGET}::test_a_key_gets_half_and_leaves_the_rest_to_others",
    ),
    Bug(
        "decoded images take no memory",
        SUBMISSION,
        '        self.held.resize(edit.source_images.size + len(self.body.mask or b""))\n',
        "",
        f"{ORDER}::test_decoded_images_count_as_memory_until_they_are_submitted",
    ),
    # image files
    Bug(
        "a colour profile is dropped unread",
        IMAGES,
        "    if profile is not None:\n        image = to_srgb(image, profile)\n",
        "",
        f"{COLOURS}::test_a_profile_is_converted_from_in_source_and_overlay",
    ),
    Bug(
        "missing rows of a PNG are black",
        IMAGES,
        'if file.file_format == "PNG" and (is_deep or _may_be_short(image)):',
        "if False:",
        f"{IMAGE_ERRORS}::test_what_is_wrong_is_named",
    ),
    Bug(
        "a wrong checksum of metadata fails an image",
        "server/image_files/png_file.py",
        "            if kind in _PIXELS:\n                raise damaged",
        "            if kind:\n                raise damaged",
        f"{IMAGE_ERRORS}::test_metadata_never_fails_an_image",
    ),
    # blame, and keys
    Bug(
        "any SIGKILL is evidence",
        DEATH,
        "return may_be_oom and not killed_by_us",
        "return not killed_by_us",
        f"{DYING}::test_sigkill_is_evidence_only_if_it_may_be_the_kernel_s",
    ),
    Bug(
        "one kill for want of memory makes all later ones evidence",
        DEATH,
        "self._before, self._last = self._last, self._read()",
        "pass",
        f"{DYING}::TestCounters::test_a_kill_long_before_a_death_does_not_count",
    ),
    Bug(
        "the supervisor tries once to requeue",
        SUPERVISOR,
        "if not await self._try_to_requeue(engine_id, blame=blame):",
        "if await self._try_to_requeue(engine_id, blame=blame) is None:",
        f"{SUPERVISING}::test_a_verdict_holds_though_redis_is_away_when_the_engine_dies",
    ),
    Bug(
        "a hanging engine is left alone",
        "server/processes/engine_watch.py",
        "process.kill()",
        "pass",
        f"{SUPERVISING}::test_an_engine_that_hangs_is_killed_and_its_jobs_are_blamed",
    ),
    Bug(
        "the supervisor always blames",
        SUPERVISOR,
        "await self._requeue_jobs(engine_id, blame=blame)",
        "await self._requeue_jobs(engine_id, blame=True)",
        f"{SUPERVISING}::test_a_dead_engine_s_jobs_are_free_at_once",
    ),
    Bug(
        "the supervisor never blames",
        SUPERVISOR,
        "await self._requeue_jobs(engine_id, blame=blame)",
        "await self._requeue_jobs(engine_id, blame=False)",
        f"{SUPERVISING}::test_a_job_is_blamed_for_a_crash",
    ),
    Bug(
        "a key file counts while it is written",
        KEYS,
        "if version == self._taken or age_s < SETTLE_S:",
        "if version == self._taken:",
        f"{KEYING}::TestRing::test_a_change_takes_effect",
    ),
    Bug(
        "keys that seem gone are refused at once",
        KEYS,
        "(may_be_cut_off and age_s < CUT_OFF_S)",
        "False",
        f"{KEYING}::TestRing::test_keys_that_are_gone_are_refused_after_ten_seconds",
    ),
    # results in object storage
    Bug(
        "all claims of a job write the same objects",
        "engine/jobs/result_store.py",
        'f"{job_id}/{epoch}-{index}.{extension}"',
        'f"{job_id}/{index}.{extension}"',
        f"{STORING}::test_a_result_never_refers_to_an_object_that_is_not_there",
    ),
    Bug(
        "images are committed beside their objects",
        "engine/jobs/codec.py",
        "if image.stored is None:",
        "if True:",
        f"{STORING}::test_redis_has_only_where_the_images_are",
    ),
    Bug(
        "objects of a lost claim stay",
        RUNNER,
        "            await self._queue.drop_images(images)\n",
        "            pass\n",
        f"{STORE_WORKER}::test_a_job_that_was_cancelled_meanwhile_leaves_no_object",
    ),
    Bug(
        "a failing result store fails the job at once",
        RUNNER,
        "with suppress(StoreUnavailable):",
        "with suppress(TimeoutError):",
        f"{STORE_WORKER}::test_an_outage_delays_jobs_and_nothing_else",
    ),
    Bug(
        "an object that cannot be read is gone",
        "engine/jobs/result_store.py",
        "            except FileNotFoundError:\n                return None",
        "            except self._failures:\n                return None",
        "tests/server/test_result_store.py::test_while_the_storage_is_away_jobs_are_read_later",
    ),
]


def main() -> int:
    with copied() as folder:
        clean = run_tests(folder, *dict.fromkeys(bug.found_by for bug in BUGS))
    print(f"no bug: {clean.stdout.splitlines()[-1]}", flush=True)
    missed = try_all(BUGS, sys.argv[1:], try_bug)
    return 1 if clean.returncode or missed else 0


if __name__ == "__main__":
    sys.exit(main())
