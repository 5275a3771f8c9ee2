-- Claims the first job of the engine's stage. Interactive jobs come first, but batch jobs get a quarter of the work
-- (pixel-steps) while both wait: the first batch job's turn comes when interactive jobs of BATCH_TURN times its work have
-- overtaken it. If it does not fit then, they go on, up to HOLD_TURN times its work and HOLD_JOBS jobs.
--
-- An engine of all stages takes of each priority what is planned first: it is nearest to its end. The others do not
-- starve, because only engines that take them in order refill the render queue.
--
-- A job whose turn it is and that does not fit is not passed over: the call grants nothing. Smaller jobs, of its queue or
-- the other, would keep the engine full and starve it.
-- Jobs of a newer format are passed over, for newer engines.
--
-- An attempt that is repeated, because its reply was lost, gets the same grant again.
--
-- args: consumer, attempt, stage (`plan`, `render` or `all`), images, kv_tokens, source_tokens, idle, lease_ms, max_format,
--   orphan_ms
-- blobs: the error of a dead-lettered job
-- returns: nil (nothing to claim) | 1 (MAX_CLEARED stale entries were cleared: call again)
--   | [id, epoch, run, quarantined, spec, submitted_at, deadline, claimed_at, plans, origin]

local BATCH_TURN, HOLD_TURN, HOLD_JOBS = 3, 16, 32
local MAX_RUNS, MAX_CLEARED, PAGE = 10, 64, 16
local WORK_OF_IMAGE = 1024 * 1024 * 50 -- where an older API wrote no `work`
local consumer, dead_letter_error, now = args.consumer, ARGV[2], now_ms()
local attempt_key = PREFIX .. ':attempt:' .. consumer
-- Each kind of engines counts by itself: they see different queues.
local turns = args.stage == 'all' and '' or ':' .. args.stage
local OVERTAKEN, OVERTAKEN_JOBS = 'overtaken' .. turns, 'overtaken_jobs' .. turns

local cleared, delivered = 0, {} -- entries cleared or passed over; the last delivered id by queue

local function is_newer(id)
  local fields = id and redis.pcall('HMGET', job_key(id), 'state', 'format', 'deadline')
  if not fields or fields.err then return false end
  local state, format, deadline = unpack(fields)
  return is_live(state) and (integer(format) or 1) > args.max_format and now < (integer(deadline) or 0)
end

-- Keeps a job for newer engines: the entries behind it can be delivered only after it.
local function pass_over(queue, entry)
  redis.call('XREADGROUP', 'GROUP', GROUP, REQUEUED, 'COUNT', 1, 'STREAMS', queue, '>')
  redis.call('XCLAIM', queue, GROUP, REQUEUED, 0, entry, 'TIME', 0, 'JUSTID')
  delivered[queue], cleared = entry, cleared + 1
end

-- Returns the first lapsed entry of a page that an engine knows, the job's id, and where the next page starts.
local function known_on_page(queue, start)
  local lapsed = redis.call('XPENDING', queue, GROUP, 'IDLE', args.lease_ms, start, '+', PAGE)
  for _, pending in ipairs(lapsed) do
    local entry = redis.call('XRANGE', queue, pending[1], pending[1])[1]
    local id = entry and entry[2][2]
    if not is_newer(id) then return pending[1], id end
  end
  return nil, nil, #lapsed == PAGE and '(' .. lapsed[PAGE][1]
end

-- Returns a lapsed entry. Behind a page of newer jobs a call looks at one more page, the next call at the one after it.
local function lapsed_head(queue)
  local entry, id, second = known_on_page(queue, '-')
  if entry or not second then return entry, id end
  local looked = PREFIX .. ':looked:' .. string.sub(queue, #queue_key('') + 1) .. ':' .. args.max_format
  local start = redis.call('GET', looked) or second
  local next_start
  entry, id, next_start = known_on_page(queue, start)
  -- pcall: a lack of memory must not stop claims
  if not entry then redis.pcall('SET', looked, next_start or second, 'PX', RESULT_TTL_MS) end
  return entry, id
end

-- Returns entry id, job id, whether the entry is pending already.
local function head(queue)
  delivered[queue] = delivered[queue] or last_delivered(queue)
  local entry, id = lapsed_head(queue)
  if entry then return entry, id, true end
  while cleared < MAX_CLEARED do
    local new = redis.call('XRANGE', queue, '(' .. delivered[queue], '+', 'COUNT', 1)[1]
    if not new then return end
    if not is_newer(new[2][2]) then return new[1], new[2][2], false end
    pass_over(queue, new[1])
  end
end

local function take(queue, entry, pending)
  if pending then
    redis.call('XCLAIM', queue, GROUP, consumer, 0, entry, 'JUSTID')
  else
    redis.call('XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', 1, 'STREAMS', queue, '>')
    delivered[queue] = entry
  end
end

-- Returns whether two deaths look like the same one. The step is that of the last report, some 0.2 s before the death,
-- so it differs by what a job does in that time; a job without a report had hardly begun.
local function alike(one, other)
  local slack = math.max(2, one.steps / 10, other.steps / 10)
  if one.phase == other.phase then return math.abs(one.step - other.step) <= slack end
  return (one.phase == '' or other.phase == '') and math.max(one.step, other.step) <= slack
end

-- Returns whether a job ends engines: it was alone in two that died alike, or in three if only lapsed leases tell of them.
-- Jobs that run together share the suspicion.
local function is_poison(deaths)
  for _, one in ipairs(deaths) do
    local like, certain = 0, 0
    for _, other in ipairs(deaths) do
      if one.alone and other.alone and alike(one, other) then
        like, certain = like + 1, certain + (other.certain and 1 or 0)
      end
    end
    if certain >= 2 or like >= 3 then return true end
  end
  return false
end

-- Returns the class, and for jobs that can be read the record. Its `deaths` include that of a lapsed claim, `death`.
local function classify(id, queue, entry, pending)
  local record = id and read_record(id)
  if id and record == false then return 'unreadable' end
  if not record or not is_live(record.state) then return 'stale', record end
  if record.entry ~= entry or queue_of(record) ~= queue then
    local own = redis.call('XRANGE', queue_of(record), record.entry, record.entry)[1]
    return own and own[2][2] == id and 'stale' or 'unreadable', record
  end
  if now >= record.deadline then return 'expired', record end
  if is_orphan(record, now) then return 'orphan', record end
  -- A running job that is not pending has lost its lease with the group.
  record.deaths, record.death = deaths_in(id, record), pending and death_of(record) or nil
  if record.death then table.insert(record.deaths, record.death) end
  if record.runs >= MAX_RUNS or is_poison(record.deaths) then return 'dead letter', record end
  if args.idle then return 'fits', record end
  if #record.deaths == 0 and record.images <= args.images and (record.stage or record.kv_tokens <= args.kv_tokens)
    and (record.source_tokens or 0) <= args.source_tokens then return 'fits', record end
  return 'waits', record
end

-- Ends a taken job that cannot run, or deletes its entry.
local function clear(class, id, queue, entry, record)
  if class == 'expired' then finish(id, 'expired') end
  if class == 'orphan' then finish(id, 'cancelled') end
  if class == 'unreadable' then fail_unreadable(id, queue, entry) end
  if class == 'dead letter' then
    finish(id, 'failed', dead_letter_error)
    redis.call('HINCRBY', COUNTERS, 'given_up', 1)
  end
  if class == 'stale' then
    redis.call('XACK', queue, GROUP, entry)
    redis.call('XDEL', queue, entry)
    if id and not (record and is_live(record.state)) then -- deleted or ended by hand
      redis.call('ZREM', WAITING, id)
      redis.call('SREM', RUNNING, id)
    end
  end
end

local function granted_claim(id, epoch, runs, quarantined)
  local spec, submitted_at, deadline, origin = unpack(
    redis.call('HMGET', job_key(id), 'spec', 'submitted_at', 'deadline', 'origin'))
  local plans = redis.pcall('HGETALL', plans_key(id))
  if plans.err then plans = false end -- not a hash
  return {id, epoch, runs + 1, quarantined and 1 or 0, spec, submitted_at, deadline, now, plans, origin}
end

-- Lets a late verdict on the engine, which `requeue_all` has, find a death.
local function note_lapse(id, epoch, engine)
  redis.call('SADD', lapsed_key(engine), string.format('%d', epoch) .. ' ' .. id)
  redis.call('PEXPIRE', lapsed_key(engine), RESULT_TTL_MS)
end

local function grant(id, record)
  local job, quarantined = job_key(id), #record.deaths > 0
  redis.call('ZREM', WAITING, id)
  redis.call('SADD', RUNNING, id)
  redis.call('HINCRBY', COUNTERS, 'granted', 1)
  if record.death then store_death(id, record.epoch, record.death) end
  if record.death and record.engine then note_lapse(id, record.epoch, record.engine) end
  local epoch = redis.call('HINCRBY', job, 'epoch', 1)
  redis.call('HSET', job, 'state', 'running', 'engine', consumer)
  if record.progress then redis.call('HDEL', job, 'progress') end
  if quarantined then redis.call('HSET', job, 'alone', epoch) end
  redis.call('SET', attempt_key, args.attempt .. ' ' .. epoch .. ' ' .. id, 'PX', RESULT_TTL_MS)
  publish_state(id, 'running')
  return granted_claim(id, epoch, record.runs, quarantined)
end

-- Returns the grant of an earlier call with the same attempt, if the job still runs here.
local function granted_before()
  local attempt, epoch, id = string.match(redis.call('GET', attempt_key) or '', '^(%S+) (%d+) (.*)$')
  if attempt ~= args.attempt then return nil end
  local record = held_record(id, tonumber(epoch))
  if not record or record.engine ~= consumer then return nil end
  last_delivered(queue_of(record))
  take(queue_of(record), record.entry, true)
  local runs = record.confirmed == record.epoch and record.runs - 1 or record.runs
  return granted_claim(id, record.epoch, runs, record.alone == record.epoch)
end

-- Returns the first job of a queue that may run; clears what is before it.
local function first(queue)
  local entry, id, pending = head(queue)
  while entry and cleared < MAX_CLEARED do
    local class, record = classify(id, queue, entry, pending)
    if class == 'fits' or class == 'waits' then
      return {queue = queue, entry = entry, id = id, pending = pending, fits = class == 'fits', record = record,
        work = record.work or record.images * WORK_OF_IMAGE}
    end
    take(queue, entry, pending)
    clear(class, id, queue, entry, record)
    cleared = cleared + 1
    entry, id, pending = head(queue)
  end
end

local before = granted_before()
if before then return before end
-- Both groups from the first call on: creating one later could be refused for lack of memory.
local queues = {interactive = {}, batch = {}}
for _, stage in ipairs(args.stage == 'all' and {'render', 'plan'} or {args.stage}) do
  for _, priority in ipairs(PRIORITIES) do
    local queue = queue_key(priority, stage)
    if stage == 'plan' or redis.call('XLEN', queue) > 0 then
      delivered[queue] = last_delivered(queue)
      table.insert(queues[priority], queue)
    end
  end
end
local function first_of(priority)
  for _, queue in ipairs(queues[priority]) do
    local job = first(queue)
    if job then return job end
  end
end
local interactive, batch = first_of('interactive'), first_of('batch')
if cleared >= MAX_CLEARED then return 1 end
if not interactive and not batch then return false end

local overtaken, overtaken_jobs = unpack(redis.call('HMGET', COUNTERS, OVERTAKEN, OVERTAKEN_JOBS))
overtaken, overtaken_jobs = tonumber(overtaken or 0), tonumber(overtaken_jobs or 0)
local both, job = interactive and batch, interactive or batch
if both and overtaken >= BATCH_TURN * batch.work
  and (batch.fits or overtaken >= HOLD_TURN * batch.work and overtaken_jobs >= HOLD_JOBS) then job = batch end
if not (job and job.fits) then return false end

take(job.queue, job.entry, job.pending)
if not both then
  if overtaken > 0 then redis.call('HDEL', COUNTERS, OVERTAKEN, OVERTAKEN_JOBS) end
elseif job == batch then
  -- A job that waited for room has more left than its share: no burst of others may follow from it.
  local left = math.min(overtaken - BATCH_TURN * job.work, BATCH_TURN * job.work + interactive.work)
  redis.call('HSET', COUNTERS, OVERTAKEN, left, OVERTAKEN_JOBS, 0)
else
  redis.call('HSET', COUNTERS, OVERTAKEN, overtaken + job.work, OVERTAKEN_JOBS, overtaken_jobs + 1)
end
return grant(job.id, job.record)
