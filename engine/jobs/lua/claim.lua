-- Claims the next job. Interactive jobs come first, but every BATCH_TURN-th claim looks at batch jobs first. The first
-- live job found is the only candidate: if it does not fit, the call grants nothing. Passing it over for smaller jobs,
-- of this queue or the other, would keep the engine full and starve it.
--
-- args: consumer, images, kv_tokens, source_tokens, idle, lease_ms, max_runs
-- blobs: the error of a dead-lettered job
-- returns: nil (nothing to claim) | 1 (MAX_CLEARED stale entries were cleared: call again)
--   | [id, epoch, runs, quarantined, spec, submitted_at, deadline, claimed_at, plans, origin]

local BATCH_TURN, QUARANTINE_RUNS, MAX_CLEARED = 4, 2, 64
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

local function classify(id, entry)
  if not id then return 'stale' end
  local state, current_entry, deadline, runs, images, kv_tokens, source_tokens = unpack(redis.call(
    'HMGET', job_key(id), 'state', 'entry', 'deadline', 'runs', 'images', 'kv_tokens', 'source_tokens'))
  if not is_live(state) or current_entry ~= entry then return 'stale' end
  if now_ms() >= tonumber(deadline) then return 'expired' end
  runs = tonumber(runs)
  if runs >= args.max_runs then return 'dead letter' end
  if args.idle then return 'fits' end
  if runs < QUARANTINE_RUNS and tonumber(images) <= args.images and tonumber(kv_tokens) <= args.kv_tokens
    and tonumber(source_tokens or 0) <= args.source_tokens then return 'fits' end
  return 'waits'
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

local order = {queue_key('interactive'), queue_key('batch')}
-- Both groups from the first call on: creating one later could be refused for lack of memory.
for _, queue in ipairs(order) do last_delivered(queue) end
local granted = tonumber(redis.call('HGET', COUNTERS, 'granted') or 0)
if (granted + 1) % BATCH_TURN == 0 then order = {order[2], order[1]} end

local cleared = 0
for _, queue in ipairs(order) do
  local entry, id, pending = head(queue)
  while entry do
    local class = classify(id, entry)
    if class == 'waits' then return false end
    take(queue, entry, pending)
    if class == 'fits' then return grant(id) end
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
    if cleared == MAX_CLEARED then return 1 end
    entry, id, pending = head(queue)
  end
end
return false
