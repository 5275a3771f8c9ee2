"""Every change of a job's state, in Lua: each script is atomic, and nothing else writes to these keys.

Keys, all behind the queue's prefix:

queue:{priority}  stream, one entry per job, read by the consumer group `engines`
job:{id}          hash, the record: the truth about the job, streams and events only lead to it
plans:{id}        hash, checkpointed plans by image index, while the job lives
sources:{id}      hash, the pictures an edit starts from by index, and `overlay`, while the job lives
partials:{id}     hash, pictures on their way, `{image}:{index}`, and their grids, `{image}:{index}:grid`
owned:{owner}     set of the owner's jobs that have not ended
idempotency:{key} the fingerprint of the request that came with the key, a space, and its job
result:{id}       hash, `meta` and the encoded pictures `image:{i}`
withdrawn:{id}    marks a job that was withdrawn before its submit got here
file:{token}      hash, a picture handed out by its URL; plan:{key}, a plan kept for the same request
waiting           sorted set of queued jobs by submit sequence: its size is what the cap is held against
running           set of running jobs
counters          hash, `submitted` (source of the sequence), `granted` (claims, for the turn of the batch queue),
                  `source_bytes` (size of all `sources:{id}`) and `given_up` (jobs that brought too many engines down)
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

PRELUDE = """
local PREFIX, RESULT_TTL_MS = ARGV[1], ARGV[2]
local GROUP, HANDED_BACK = 'engines', 'handed-back'
local WAITING, RUNNING, COUNTERS = PREFIX .. ':waiting', PREFIX .. ':running', PREFIX .. ':counters'

local function job_key(id) return PREFIX .. ':job:' .. id end
local function plans_key(id) return PREFIX .. ':plans:' .. id end
local function sources_key(id) return PREFIX .. ':sources:' .. id end
local function partials_key(id) return PREFIX .. ':partials:' .. id end
local function owned_key(owner) return PREFIX .. ':owned:' .. owner end
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
  redis.call('DEL', plans_key(id), sources_key(id))
  redis.call('PEXPIRE', partials_key(id), RESULT_TTL_MS)
  local priority, entry, owner, source_bytes = unpack(
    redis.call('HMGET', job, 'priority', 'entry', 'owner', 'source_bytes'))
  if owner and owner ~= '' then redis.call('SREM', owned_key(owner), id) end
  if source_bytes then redis.call('HINCRBY', COUNTERS, 'source_bytes', -source_bytes) end
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
  redis.call('HDEL', job, 'engine', 'progress')
  redis.call('HSET', job, 'state', 'queued')
  redis.call('ZADD', WAITING, redis.call('HGET', job, 'sequence'), id)
  announce(id, 'queued')
  wake(id)
end
"""
