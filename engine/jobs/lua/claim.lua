-- Claims the first job of a queue. Interactive jobs come first, but batch jobs get a quarter of the work (pixel-steps)
-- while both wait: the first batch job's turn comes when interactive jobs of BATCH_TURN times its work have overtaken
-- it. If it does not fit then, they go on, up to HOLD_TURN times its work and HOLD_JOBS jobs.
--
-- A job whose turn it is and that does not fit is not passed over: the call grants nothing. Smaller jobs, of its queue or
-- the other, would keep the engine full and starve it.
--
-- args: consumer, images, kv_tokens, source_tokens, idle, lease_ms, max_runs
-- blobs: the error of a dead-lettered job
-- returns: nil (nothing to claim) | 1 (MAX_CLEARED stale entries were cleared: call again)
--   | [id, epoch, runs, quarantined, spec, submitted_at, deadline, claimed_at, plans, origin]

local BATCH_TURN, HOLD_TURN, HOLD_JOBS = 3, 16, 32
local QUARANTINE_RUNS, MAX_CLEARED = 2, 64
local WORK_OF_IMAGE = 1024 * 1024 * 50 -- where an older API wrote no `work`
local consumer, dead_letter_error = args.consumer, ARGV[2]

-- Returns entry id, job id, whether the entry is pending already.
local function head(queue)
  local after = last_delivered(queue)
  local lapsed = redis.call('XPENDING', queue, GROUP, 'IDLE', args.lease_ms, '-', '+', 1)[1]
  if lapsed then
    local entry = redis.call('XRANGE', queue, lapsed[1], lapsed[1])[1]
    return lapsed[1], entry and entry[2][2], true
  end
  local new = redis.call('XRANGE', queue, '(' .. after, '+', 'COUNT', 1)[1]
  if new then return new[1], new[2][2], false end
end

local function take(queue, entry, pending)
  if pending then
    redis.call('XCLAIM', queue, GROUP, consumer, 0, entry, 'JUSTID')
  else
    redis.call('XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', 1, 'STREAMS', queue, '>')
  end
end

-- Returns the class, and the work of a job that may run.
local function classify(id, entry)
  if not id then return 'stale' end
  local state, current_entry, deadline, runs, images, kv_tokens, source_tokens, work = unpack(redis.call('HMGET',
    job_key(id), 'state', 'entry', 'deadline', 'runs', 'images', 'kv_tokens', 'source_tokens', 'work'))
  if not is_live(state) or current_entry ~= entry then return 'stale' end
  if now_ms() >= tonumber(deadline) then return 'expired' end
  runs, work = tonumber(runs), tonumber(work) or images * WORK_OF_IMAGE
  if runs >= args.max_runs then return 'dead letter' end
  if args.idle then return 'fits', work end
  if runs < QUARANTINE_RUNS and tonumber(images) <= args.images and tonumber(kv_tokens) <= args.kv_tokens
    and tonumber(source_tokens or 0) <= args.source_tokens then return 'fits', work end
  return 'waits', work
end

local function grant(id)
  local job = job_key(id)
  redis.call('ZREM', WAITING, id)
  redis.call('SADD', RUNNING, id)
  redis.call('HINCRBY', COUNTERS, 'granted', 1)
  local epoch, runs = redis.call('HINCRBY', job, 'epoch', 1), redis.call('HINCRBY', job, 'runs', 1)
  redis.call('HSET', job, 'state', 'running', 'engine', consumer)
  redis.call('HDEL', job, 'progress')
  publish_state(id, 'running')
  local spec, submitted_at, deadline, origin = unpack(
    redis.call('HMGET', job, 'spec', 'submitted_at', 'deadline', 'origin'))
  local quarantined = runs > QUARANTINE_RUNS and 1 or 0
  local plans = redis.call('HGETALL', plans_key(id))
  return {id, epoch, runs, quarantined, spec, submitted_at, deadline, now_ms(), plans, origin}
end

-- Returns the first job of a queue that may run; clears what is before it.
local cleared = 0
local function first(queue)
  local entry, id, pending = head(queue)
  while entry and cleared < MAX_CLEARED do
    local class, work = classify(id, entry)
    if class == 'fits' or class == 'waits' then
      return {queue = queue, entry = entry, id = id, pending = pending, fits = class == 'fits', work = work}
    end
    take(queue, entry, pending)
    if class == 'expired' then finish(id, 'expired') end
    if class == 'dead letter' then
      finish(id, 'failed', dead_letter_error)
      redis.call('HINCRBY', COUNTERS, 'given_up', 1)
    end
    if class == 'stale' then
      redis.call('XACK', queue, GROUP, entry)
      redis.call('XDEL', queue, entry)
    end
    cleared = cleared + 1
    entry, id, pending = head(queue)
  end
end

-- Both groups from the first call on: creating one later could be refused for lack of memory.
local queues = {queue_key('interactive'), queue_key('batch')}
for _, queue in ipairs(queues) do last_delivered(queue) end
local interactive, batch = first(queues[1]), first(queues[2])
if cleared == MAX_CLEARED then return 1 end

local overtaken, overtaken_jobs = unpack(redis.call('HMGET', COUNTERS, 'overtaken', 'overtaken_jobs'))
overtaken, overtaken_jobs = tonumber(overtaken or 0), tonumber(overtaken_jobs or 0)
local both, job = interactive and batch, interactive or batch
if both and overtaken >= BATCH_TURN * batch.work
  and (batch.fits or overtaken >= HOLD_TURN * batch.work and overtaken_jobs >= HOLD_JOBS) then job = batch end
if not (job and job.fits) then return false end

if not both then
  redis.call('HDEL', COUNTERS, 'overtaken', 'overtaken_jobs')
elseif job == batch then
  -- A job that waited for room has more left than its share: no burst of others may follow from it.
  local left = math.min(overtaken - BATCH_TURN * job.work, BATCH_TURN * job.work + interactive.work)
  redis.call('HSET', COUNTERS, 'overtaken', left, 'overtaken_jobs', 0)
else
  redis.call('HSET', COUNTERS, 'overtaken', overtaken + job.work, 'overtaken_jobs', overtaken_jobs + 1)
end
take(job.queue, job.entry, job.pending)
return grant(job.id)
