"""Every change of a job's state, in Lua: each script is atomic, and nothing else writes to these keys.

Keys, all behind the queue's prefix:

queue:{priority}  stream, one entry per job, read by the consumer group `engines`
job:{id}          hash, the record: the truth about the job, streams and events only lead to it
plans:{id}        hash, checkpointed plans by image index, while the job lives
result:{id}       hash, `meta` and the encoded pictures `image:{i}`
withdrawn:{id}    marks a job that was withdrawn before its submit got here
waiting           sorted set of queued jobs by submit sequence: its size is what the cap is held against
running           set of running jobs
counters          hash, `submitted` (source of the sequence) and `granted` (claims, for the turn of the batch queue)
engine:{id}       hash, heartbeat of an engine; `engines` is the set of their ids
events, wake      pub/sub channels; losing a message only costs time

Invariants:

- A queued or running job has exactly one stream entry, named by its record. It is pending in the group from the
  first claim on. Ending a job deletes the entry if it is pending; if not, it stays until an engine draws it, finds
  the job ended and deletes it (deleting undelivered entries falsifies the group's counts).
- A lease is the idle time of the pending entry. An entry that is idle for longer than the lease is anybody's.
- A claim raises `epoch`. What an engine writes takes effect only if the job runs and the epoch is the claim's.
- In each script the first write is one that Redis refuses when it is out of memory, or else the script is allowed to
  go through then (claiming, ending): a script that has written once is never stopped half way.

Keys are built inside the scripts, so a Redis Cluster is not supported. All times are Redis' own, in milliseconds.
ARGV is [prefix, result_ttl_ms, ...the script's own arguments].
"""

_PRELUDE = """
local PREFIX, RESULT_TTL_MS = ARGV[1], ARGV[2]
local GROUP, HANDED_BACK = 'engines', 'handed-back'
local WAITING, RUNNING, COUNTERS = PREFIX .. ':waiting', PREFIX .. ':running', PREFIX .. ':counters'

local function job_key(id) return PREFIX .. ':job:' .. id end
local function plans_key(id) return PREFIX .. ':plans:' .. id end
local function result_key(id) return PREFIX .. ':result:' .. id end
local function withdrawn_key(id) return PREFIX .. ':withdrawn:' .. id end
local function queue_key(priority) return PREFIX .. ':queue:' .. priority end

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function is_live(state) return state == 'queued' or state == 'running' end

local function announce(id, state)
  redis.call('PUBLISH', PREFIX .. ':events', cjson.encode({job = id, state = state}))
end

local function wake(id) redis.call('PUBLISH', PREFIX .. ':wake', id) end

local function holds(id, epoch)
  local state, current = unpack(redis.call('HMGET', job_key(id), 'state', 'epoch'))
  return state == 'running' and current == epoch
end

-- The last entry delivered to the group. Makes the group where it is missing (new or flushed Redis); from id 0,
-- because jobs may have been submitted before.
local function last_delivered(queue)
  if redis.call('EXISTS', queue) == 1 then
    for _, group in ipairs(redis.call('XINFO', 'GROUPS', queue)) do
      local info = {}
      for i = 1, #group, 2 do info[group[i]] = group[i + 1] end
      if info['name'] == GROUP then return info['last-delivered-id'] end
    end
  end
  redis.call('XGROUP', 'CREATE', queue, GROUP, '0', 'MKSTREAM')
  return '0-0'
end

-- Ends a job that the caller found live.
local function finish(id, state, error)
  local job = job_key(id)
  redis.call('ZREM', WAITING, id)
  redis.call('SREM', RUNNING, id)
  redis.call('DEL', plans_key(id))
  local priority, entry = unpack(redis.call('HMGET', job, 'priority', 'entry'))
  local queue = queue_key(priority)
  if redis.call('XACK', queue, GROUP, entry) == 1 then redis.call('XDEL', queue, entry) end
  redis.call('HSET', job, 'state', state)
  if error then redis.call('HSET', job, 'error', error) end
  redis.call('PEXPIRE', job, RESULT_TTL_MS)
  announce(id, state)
end

-- Makes a running job claimable at once, in its old place. The entry goes to a consumer that stands for nobody, so
-- that a departed engine's consumer holds nothing and can be removed.
local function hand_back(id, queue, entry)
  local job = job_key(id)
  redis.call('SREM', RUNNING, id)
  redis.call('XCLAIM', queue, GROUP, HANDED_BACK, 0, entry, 'TIME', 0, 'JUSTID')
  redis.call('HDEL', job, 'owner', 'progress')
  redis.call('HSET', job, 'state', 'queued')
  redis.call('ZADD', WAITING, redis.call('HGET', job, 'sequence'), id)
  announce(id, 'queued')
  wake(id)
end
"""

# -> 'accepted' | 'known' (or withdrawn) | 'full'
SUBMIT = (
    _PRELUDE
    + """
local id, priority, spec, images, kv_tokens, timeout_ms, max_queue = unpack(ARGV, 3)
local job = job_key(id)
if redis.call('EXISTS', job, withdrawn_key(id)) > 0 then return 'known' end
if redis.call('ZCARD', WAITING) >= tonumber(max_queue) then return 'full' end
local now = now_ms()
local sequence = redis.call('HINCRBY', COUNTERS, 'submitted', 1)
local entry = redis.call('XADD', queue_key(priority), '*', 'job', id)
redis.call('HSET', job, 'state', 'queued', 'priority', priority, 'spec', spec, 'sequence', sequence, 'entry', entry,
  'images', images, 'kv_tokens', kv_tokens, 'submitted_at', now, 'deadline', now + timeout_ms, 'epoch', 0, 'runs', 0)
redis.call('ZADD', WAITING, sequence, id)
wake(id)
return 'accepted'
"""
)

# state is 'cancelled', or 'expired', which holds only from the deadline on. -> 1 if this call ended the job
END = (
    _PRELUDE
    + """
local id, state = unpack(ARGV, 3)
local current, deadline = unpack(redis.call('HMGET', job_key(id), 'state', 'deadline'))
if not is_live(current) then return 0 end
if state == 'expired' and now_ms() < tonumber(deadline) then return 0 end
finish(id, state)
return 1
"""
)

# A submit that its sender gave up may still be on its way to us, so an unknown job is marked. -> 1 as for END
WITHDRAW = (
    _PRELUDE
    + """
local id = ARGV[3]
local state = redis.call('HGET', job_key(id), 'state')
if not state then
  redis.call('SET', withdrawn_key(id), 1, 'PX', RESULT_TTL_MS)
  return 0
end
redis.call('DEL', result_key(id))
if not is_live(state) then return 0 end
finish(id, 'cancelled')
return 1
"""
)

# -> 1 if the job has ended and goes in `left_ms`
DELIVERED = (
    _PRELUDE
    + """
local id, left_ms = unpack(ARGV, 3)
local state = redis.call('HGET', job_key(id), 'state')
if not state or is_live(state) then return 0 end
redis.call('PEXPIRE', job_key(id), left_ms)
redis.call('PEXPIRE', result_key(id), left_ms)
return 1
"""
)

# -> [waiting, running]
STATS = _PRELUDE + "return {redis.call('ZCARD', WAITING), redis.call('SCARD', RUNNING)}"

# Interactive jobs come first, but every BATCH_TURN-th claim looks at batch jobs first. The first live job found is
# the only candidate: if it does not fit, the call grants nothing. Passing it over for smaller jobs, of this queue or
# the other, would keep the engine full and let it starve.
#
# -> nil (nothing to take) | 1 (cleared away MAX_LOOKS dead entries: call again)
#    | [id, epoch, runs, suspect, spec, submitted_at, deadline, plans]
CLAIM = (
    _PRELUDE
    + """
local BATCH_TURN, SUSPECT_RUNS, MAX_LOOKS = 4, 2, 64
local consumer, images, kv_tokens, idle, lease_ms, max_runs, poison_error = unpack(ARGV, 3)

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
  local state, current_entry, deadline, runs, job_images, job_kv_tokens = unpack(
    redis.call('HMGET', job_key(id), 'state', 'entry', 'deadline', 'runs', 'images', 'kv_tokens'))
  if not is_live(state) or current_entry ~= entry then return 'dead' end
  if now_ms() >= tonumber(deadline) then return 'expired' end
  runs = tonumber(runs)
  if runs >= tonumber(max_runs) then return 'poison' end
  if idle == '1' then return 'fits' end
  if runs < SUSPECT_RUNS and tonumber(job_images) <= tonumber(images)
    and tonumber(job_kv_tokens) <= tonumber(kv_tokens) then return 'fits' end
  return 'waits'
end

local function grant(id)
  local job = job_key(id)
  redis.call('ZREM', WAITING, id)
  redis.call('SADD', RUNNING, id)
  redis.call('HINCRBY', COUNTERS, 'granted', 1)
  local epoch, runs = redis.call('HINCRBY', job, 'epoch', 1), redis.call('HINCRBY', job, 'runs', 1)
  redis.call('HSET', job, 'state', 'running', 'owner', consumer)
  redis.call('HDEL', job, 'progress')
  announce(id, 'running')
  local spec, submitted_at, deadline = unpack(redis.call('HMGET', job, 'spec', 'submitted_at', 'deadline'))
  local suspect = runs > SUSPECT_RUNS and 1 or 0
  return {id, epoch, runs, suspect, spec, submitted_at, deadline, redis.call('HGETALL', plans_key(id))}
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
    if verdict == 'poison' then finish(id, 'failed', poison_error) end
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
    _PRELUDE
    + """
local consumer, now, lost = ARGV[3], now_ms(), {}
for i = 4, #ARGV, 2 do
  local id, epoch = ARGV[i], ARGV[i + 1]
  local owner, deadline, priority, entry = unpack(
    redis.call('HMGET', job_key(id), 'owner', 'deadline', 'priority', 'entry'))
  if not holds(id, epoch) or owner ~= consumer then
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
    _PRELUDE
    + """
local id, epoch, progress = unpack(ARGV, 3)
if not holds(id, epoch) then return 0 end
redis.call('HSET', job_key(id), 'progress', progress)
redis.call('PUBLISH', PREFIX .. ':events', '{"job":' .. cjson.encode(id) .. ',"progress":' .. progress .. '}')
return 1
"""
)

CHECKPOINT_PLAN = (
    _PRELUDE
    + """
local id, epoch, index, plan = unpack(ARGV, 3)
if not holds(id, epoch) then return 0 end
redis.call('HSET', plans_key(id), index, plan)
return 1
"""
)

# ARGV goes on with the fields of the result: name, value, name, value, ...
COMMIT = (
    _PRELUDE
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
    _PRELUDE
    + """
local id, epoch, error = unpack(ARGV, 3)
if not holds(id, epoch) then return 0 end
finish(id, 'failed', error)
return 1
"""
)

RELEASE = (
    _PRELUDE
    + """
local consumer, id, epoch = unpack(ARGV, 3)
local owner, priority, entry = unpack(redis.call('HMGET', job_key(id), 'owner', 'priority', 'entry'))
if not holds(id, epoch) or owner ~= consumer then return 0 end
last_delivered(queue_key(priority))
hand_back(id, queue_key(priority), entry)
redis.call('HINCRBY', job_key(id), 'runs', -1)
return 1
"""
)

# The runs stay counted: the consumer died with them. -> how many jobs were handed back
SURRENDER = (
    _PRELUDE
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
    _PRELUDE
    + """
local id, ttl_ms, info, metrics = unpack(ARGV, 3)
local key = PREFIX .. ':engine:' .. id
redis.call('HSET', key, 'info', info, 'metrics', metrics)
redis.call('PEXPIRE', key, ttl_ms)
redis.call('SADD', PREFIX .. ':engines', id)
"""
)

# -> [id, value of the field, ...] of the live engines, in order of their ids; forgets the others
ENGINES = (
    _PRELUDE
    + """
local field, live = ARGV[3], {}
local ids = redis.call('SMEMBERS', PREFIX .. ':engines')
table.sort(ids)
for _, id in ipairs(ids) do
  local value = redis.call('HGET', PREFIX .. ':engine:' .. id, field)
  if value then
    table.insert(live, id)
    table.insert(live, value)
  else
    redis.call('SREM', PREFIX .. ':engines', id)
  end
end
return live
"""
)
