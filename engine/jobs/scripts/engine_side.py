"""What the engines ask of Redis; see `engine.jobs.scripts` for the keys."""

from engine.jobs.scripts import PRELUDE

# Interactive jobs come first, but every BATCH_TURN-th claim looks at batch jobs first. The first live job found is
# the only candidate: if it does not fit, the call grants nothing. Passing it over for smaller jobs, of this queue or
# the other, would keep the engine full and let it starve.
#
# -> nil (nothing to take) | 1 (cleared away MAX_LOOKS dead entries: call again)
#    | [id, epoch, runs, suspect, spec, submitted_at, deadline, claimed_at, plans, origin]
CLAIM = (
    PRELUDE
    + """
local BATCH_TURN, SUSPECT_RUNS, MAX_LOOKS = 4, 2, 64
local consumer, images, kv_tokens, source_tokens, idle, lease_ms, max_runs, poison_error = unpack(ARGV, 3)

-- entry id, job id, whether the entry is pending already
local function head(queue)
  local after = last_delivered(queue)
  local lapsed = redis.call('XPENDING', queue, GROUP, 'IDLE', lease_ms, '-', '+', 1)[1]
  if lapsed then
    local entry = redis.call('XRANGE', queue, lapsed[1], lapsed[1])[1]
    return lapsed[1], entry and entry[2][2], true
  end
  local fresh = redis.call('XRANGE', queue, '(' .. after, '+', 'COUNT', 1)[1]
  if fresh then return fresh[1], fresh[2][2], false end
end

local function draw(queue, entry, pending)
  if pending then
    redis.call('XCLAIM', queue, GROUP, consumer, 0, entry, 'JUSTID')
  else
    redis.call('XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', 1, 'STREAMS', queue, '>')
  end
end

local function judge(id, entry)
  if not id then return 'dead' end
  local state, current_entry, deadline, runs, job_images, job_kv_tokens, job_source_tokens = unpack(redis.call(
    'HMGET', job_key(id), 'state', 'entry', 'deadline', 'runs', 'images', 'kv_tokens', 'source_tokens'))
  if not is_live(state) or current_entry ~= entry then return 'dead' end
  if now_ms() >= tonumber(deadline) then return 'expired' end
  runs = tonumber(runs)
  if runs >= tonumber(max_runs) then return 'poison' end
  if idle == '1' then return 'fits' end
  if runs < SUSPECT_RUNS and tonumber(job_images) <= tonumber(images)
    and tonumber(job_kv_tokens) <= tonumber(kv_tokens)
    and tonumber(job_source_tokens or 0) <= tonumber(source_tokens) then return 'fits' end
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
  announce(id, 'running')
  local spec, submitted_at, deadline, origin = unpack(
    redis.call('HMGET', job, 'spec', 'submitted_at', 'deadline', 'origin'))
  local suspect = runs > SUSPECT_RUNS and 1 or 0
  local plans = redis.call('HGETALL', plans_key(id))
  return {id, epoch, runs, suspect, spec, submitted_at, deadline, now_ms(), plans, origin}
end

local order = {queue_key('interactive'), queue_key('batch')}
-- Both groups from the first call on: making one later could be refused for want of memory.
for _, queue in ipairs(order) do last_delivered(queue) end
local granted = tonumber(redis.call('HGET', COUNTERS, 'granted') or 0)
if (granted + 1) % BATCH_TURN == 0 then order = {order[2], order[1]} end

local looks = 0
for _, queue in ipairs(order) do
  local entry, id, pending = head(queue)
  while entry do
    local verdict = judge(id, entry)
    if verdict == 'waits' then return false end
    draw(queue, entry, pending)
    if verdict == 'fits' then return grant(id) end
    if verdict == 'expired' then finish(id, 'expired') end
    if verdict == 'poison' then
      finish(id, 'failed', poison_error)
      redis.call('HINCRBY', COUNTERS, 'given_up', 1)
    end
    if verdict == 'dead' then
      redis.call('XACK', queue, GROUP, entry)
      redis.call('XDEL', queue, entry)
    end
    looks = looks + 1
    if looks == MAX_LOOKS then return 1 end
    entry, id, pending = head(queue)
  end
end
return false
"""
)

# ARGV goes on with id, epoch, id, epoch, ... -> indices (from 0) of the claims that are lost. Only a job's own
# consumer may renew: XCLAIM would hand the entry to whoever asks.
RENEW = (
    PRELUDE
    + """
local consumer, now, lost = ARGV[3], now_ms(), {}
for i = 4, #ARGV, 2 do
  local id, epoch = ARGV[i], ARGV[i + 1]
  local engine, deadline, priority, entry = unpack(
    redis.call('HMGET', job_key(id), 'engine', 'deadline', 'priority', 'entry'))
  if not holds(id, epoch) or engine ~= consumer then
    table.insert(lost, (i - 4) / 2)
  elseif now >= tonumber(deadline) then
    finish(id, 'expired')
    table.insert(lost, (i - 4) / 2)
  else
    last_delivered(queue_key(priority))
    redis.call('XCLAIM', queue_key(priority), GROUP, consumer, 0, entry, 'JUSTID')
  end
end
return lost
"""
)

# -> 1 if it took effect, as for all that follow
PROGRESS = (
    PRELUDE
    + """
local id, epoch, progress = unpack(ARGV, 3)
if not holds(id, epoch) then return 0 end
redis.call('HSET', job_key(id), 'progress', progress)
redis.call('PUBLISH', PREFIX .. ':events', '{"job":' .. cjson.encode(id) .. ',"progress":' .. progress .. '}')
return 1
"""
)

CHECKPOINT_PLAN = (
    PRELUDE
    + """
local id, epoch, index, plan = unpack(ARGV, 3)
if not holds(id, epoch) then return 0 end
redis.call('HSET', plans_key(id), index, plan)
return 1
"""
)

PARTIAL = (
    PRELUDE
    + """
local id, epoch, image, index, data, grid = unpack(ARGV, 3)
if not holds(id, epoch) then return 0 end
local name = image .. ':' .. index
redis.call('HSET', partials_key(id), name, data, name .. ':grid', grid)
redis.call('PUBLISH', PREFIX .. ':events', '{"job":' .. cjson.encode(id) .. ',"partial":"' .. name .. '"}')
return 1
"""
)

# ARGV goes on with the fields of the result: name, value, name, value, ...
COMMIT = (
    PRELUDE
    + """
local id, epoch = ARGV[3], ARGV[4]
if not holds(id, epoch) then return 0 end
redis.call('HSET', result_key(id), unpack(ARGV, 5))
redis.call('PEXPIRE', result_key(id), RESULT_TTL_MS)
finish(id, 'succeeded')
return 1
"""
)

FAIL = (
    PRELUDE
    + """
local id, epoch, error = unpack(ARGV, 3)
if not holds(id, epoch) then return 0 end
finish(id, 'failed', error)
return 1
"""
)

RELEASE = (
    PRELUDE
    + """
local consumer, id, epoch = unpack(ARGV, 3)
local engine, priority, entry = unpack(redis.call('HMGET', job_key(id), 'engine', 'priority', 'entry'))
if not holds(id, epoch) or engine ~= consumer then return 0 end
last_delivered(queue_key(priority))
hand_back(id, queue_key(priority), entry)
redis.call('HINCRBY', job_key(id), 'runs', -1)
return 1
"""
)

# The runs stay counted: the consumer died with them. -> how many jobs were handed back
SURRENDER = (
    PRELUDE
    + """
local consumer, jobs = ARGV[3], 0
for _, priority in ipairs({'interactive', 'batch'}) do
  local queue = queue_key(priority)
  last_delivered(queue)
  for _, pending in ipairs(redis.call('XPENDING', queue, GROUP, '-', '+', 10000, consumer)) do
    local entry = redis.call('XRANGE', queue, pending[1], pending[1])[1]
    local id = entry and entry[2][2]
    if id and redis.call('HGET', job_key(id), 'entry') == pending[1] then
      hand_back(id, queue, pending[1])
      jobs = jobs + 1
    else
      redis.call('XACK', queue, GROUP, pending[1])
      redis.call('XDEL', queue, pending[1])
    end
  end
  redis.call('XGROUP', 'DELCONSUMER', queue, GROUP, consumer)
end
return jobs
"""
)

HEARTBEAT = (
    PRELUDE
    + """
local id, ttl_ms, info, metrics = unpack(ARGV, 3)
local key = PREFIX .. ':engine:' .. id
redis.call('HSET', key, 'info', info, 'metrics', metrics)
redis.call('PEXPIRE', key, ttl_ms)
redis.call('SADD', PREFIX .. ':engines', id)
"""
)
