-- Put before every script of this folder. A script is one atomic change of a job's state; nothing else writes to these
-- keys.
--
--   queued -> running                             claim
--   running -> queued                             requeue, requeue_all; hand_over, of a planned job to the renderers
--   running -> succeeded | failed                 commit, fail
--   queued, running -> failed                     claim, of a job that ends engines; any, of one that cannot be read
--   queued, running -> cancelled                  end_job, discard; claim, renew, of one whose client is gone
--   queued, running -> expired                    end_job, ended_among, claim, renew, from the deadline on
--
-- A running job whose lease has lapsed is claimed like a queued one.
--
-- Keys, each behind the queue's prefix:
--
--   queue:{priority}  stream, one entry per job, read by the consumer group `engines`
--   queue:render:{priority} such a stream of the jobs that were handed over, `stage` of whose records is `render`
--   job:{id}          hash, the record; streams and events only lead to it
--   plans:{id}        hash, checkpointed plans by image index, and `handed_over`, while the job lives
--   sources:{id}      hash, an edit's source images by index, and `overlay`, while the job lives
--   partials:{id}     hash, partial images `{image}:{index}`, and their grids `{image}:{index}:grid`
--   owned:{owner}     set of the owner's queued and running jobs
--   idempotency:{key} fingerprint of the request that brought the key, a space, the id of its job
--   result:{id}       hash, `meta` and the encoded images `image:{i}`
--   withdrawn:{id}    set for a job that was discarded before its submit arrived
--   file:{token}      hash, an image served by URL; plan:{key}: a cached plan
--   waiting           sorted set of queued jobs by submit sequence; its size is what `max_queue` limits
--   running           set of running jobs
--   previews          list of `{epoch} {image} {id}\n{grid}`: previews that a renderer may render while their job is planned
--   counters          hash: `submitted` (source of the sequence), `granted` (claims), `overtaken`, `overtaken_jobs`
--                     (work and number of interactive jobs claimed while the first batch job waited; with `:{stage}`,
--                     of the engines of one stage),
--                     `source_bytes` (size of all `sources:{id}`), `given_up` (dead-lettered jobs)
--   counters:kept     hash: bytes of a job in Redis as `{bytes} {source bytes} {file bytes} {owner}`: what a live one may
--                     come to, what an ended one has left, with its files. counters:kept_until: sorted set of these
--                     jobs by the time at which submits look at them again. counters:kept_total: hash of sums,
--                     `bytes`, and by owner `bytes:{owner}`, `sources:{owner}`
--   counters:plans    sorted set of `{bytes} {key}` of cached plans by their expiry; counters:plan_bytes: their sum
--   engine:{id}       hash, heartbeat of an engine; `engines` is the set of their ids;
--                     last_engine: the last one that planned, for APIs that need none to be there
--   lapsed:{engine}   set of `{epoch} {job id}`: deaths stored because its leases lapsed
--   attempt:{engine}  the engine's last successful claim: id of the attempt, epoch, id of the job
--   looked:{queue}:{format} where the next claim of engines of an older format looks among newer jobs
--   apis              sorted set of API processes by their last heartbeat; heard: hash, see prelude_records.lua
--   events, wake, wake:render, previews  pub/sub channels; a lost message costs only time
--
-- Invariants:
--
-- - A queued or running job has exactly one stream entry, named by its record and pending in the group from the first
--   claim on. Ending the job deletes it: a client that submits and cancels leaves no entries for claims to skip.
-- - Ids of entries differ between the stages: a process that does not know of stages deletes none but its own.
-- - A lease is the idle time of the pending entry. Any engine may take an entry that is idle for longer.
-- - An entry of a newer format than an engine knows is pending under `handed-back`, for a newer engine.
-- - A claim raises `epoch`. A write of an engine takes effect only while the job runs under the epoch of its claim.
-- - The first write of a script is one that Redis refuses when it is out of memory, or else the script may run then
--   (claiming, ending). So a script that has written is never stopped half way.
--
-- Keys are built inside the scripts: in a cluster the prefix is a hash tag, and one node has them all. Times are
-- milliseconds of Redis' clock.
--
-- Arguments: ARGV[1] is a JSON object of named scalars, here `args`; None is left out and reads as nil. What is stored
-- byte for byte (JSON documents, images) follows from ARGV[2] on, in the order each script states. cjson turns integers
-- into doubles, exact up to 2^53; redis.call writes them in full, `..` only up to 14 digits.

local args = cjson.decode(ARGV[1])
local PREFIX, RESULT_TTL_MS = args.prefix, args.result_ttl_ms
local GROUP, REQUEUED = 'engines', 'handed-back'
local WAITING, RUNNING, COUNTERS = PREFIX .. ':waiting', PREFIX .. ':running', PREFIX .. ':counters'
local KEPT, KEPT_UNTIL, KEPT_TOTAL = COUNTERS .. ':kept', COUNTERS .. ':kept_until', COUNTERS .. ':kept_total'
local KEPT_BESIDE = 1024 -- bytes of a job in keys that list jobs, and of its idempotency key

local function job_key(id) return PREFIX .. ':job:' .. id end
local function plans_key(id) return PREFIX .. ':plans:' .. id end
local function sources_key(id) return PREFIX .. ':sources:' .. id end
local function partials_key(id) return PREFIX .. ':partials:' .. id end
local function owned_key(owner) return PREFIX .. ':owned:' .. owner end
local function result_key(id) return PREFIX .. ':result:' .. id end
local function withdrawn_key(id) return PREFIX .. ':withdrawn:' .. id end
local function idempotency_key(key) return PREFIX .. ':idempotency:' .. key end
local PRIORITIES = {'interactive', 'batch'}
local function queue_key(priority, stage)
  return PREFIX .. ':queue:' .. (stage == 'render' and 'render:' or '') .. priority
end
local function queue_of(record) return queue_key(record.priority, record.stage) end
local function place_of(queue)
  for _, priority in ipairs(PRIORITIES) do
    if queue == queue_key(priority) then return priority end
    if queue == queue_key(priority, 'render') then return priority, 'render' end
  end
end
local function lapsed_key(engine) return PREFIX .. ':lapsed:' .. engine end

local function now_ms()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

local function is_live(state) return state == 'queued' or state == 'running' end

local function publish_state(id, state)
  redis.call('PUBLISH', PREFIX .. ':events', cjson.encode({job = id, state = state}))
end

local function wake_engines(id, stage)
  redis.call('PUBLISH', PREFIX .. (stage == 'render' and ':wake:render' or ':wake'), id)
end

-- Returns an integer that Redis counts with and a double holds exactly; nil for any other text.
local function integer(text)
  local digits = text == '0' and text or string.match(text or '', '^%-?([1-9]%d*)$')
  return digits and #digits <= 15 and tonumber(text) or nil
end

local function holds(id, epoch)
  local fields = redis.pcall('HMGET', job_key(id), 'state', 'epoch')
  if fields.err then return false end -- not a hash
  local state, current = unpack(fields)
  return state == 'running' and tonumber(current) == epoch
end

-- Returns the id of the last entry delivered to the group. Creates the group where a new or flushed Redis has none,
-- from id 0, because jobs may have been submitted before.
local function last_delivered(queue)
  for _, group in ipairs(redis.pcall('XINFO', 'GROUPS', queue)) do -- an error, without a stream, has no items
    local info = {}
    for i = 1, #group, 2 do info[group[i]] = group[i + 1] end
    if info['name'] == GROUP then return info['last-delivered-id'] end
  end
  redis.call('XGROUP', 'CREATE', queue, GROUP, '0', 'MKSTREAM')
  return '0-0'
end

-- Returns the queues; those of the render stage exist from the first hand-over on.
local function all_queues()
  local queues = {queue_key('interactive'), queue_key('batch')}
  for _, priority in ipairs(PRIORITIES) do
    local queue = queue_key(priority, 'render')
    if redis.call('EXISTS', queue) == 1 then table.insert(queues, queue) end
  end
  return queues
end

-- Sets what a job counts for, `files` of it for its files; without a time it counts for nothing.
local function count_kept(id, owner, bytes, source_bytes, until_ms, files, is_new)
  local old = not is_new and redis.call('HGET', KEPT, id) or ''
  local old_bytes, old_source_bytes, old_owner = string.match(old, '^(%d+) (%d+) %d+ (.*)$')
  owner = old_owner or owner
  redis.call('HINCRBY', KEPT_TOTAL, 'bytes', bytes - (old_bytes or 0))
  if owner ~= '' then
    local more_sources = source_bytes - (old_source_bytes or 0)
    redis.call('HINCRBY', KEPT_TOTAL, 'bytes:' .. owner, bytes - (old_bytes or 0))
    if more_sources ~= 0 then redis.call('HINCRBY', KEPT_TOTAL, 'sources:' .. owner, more_sources) end
  end
  if until_ms then
    redis.call('HSET', KEPT, id, string.format('%.0f %.0f %.0f %s', bytes, source_bytes, files or 0, owner))
    redis.call('ZADD', KEPT_UNTIL, until_ms, id)
  else
    redis.call('HDEL', KEPT, id)
    redis.call('ZREM', KEPT_UNTIL, id)
  end
end

-- Lets the counts expire with the last data, if no job is live.
local function expire_kept()
  if redis.call('ZCARD', WAITING) > 0 or redis.call('SCARD', RUNNING) > 0 then return end
  for _, key in ipairs({KEPT, KEPT_UNTIL, KEPT_TOTAL}) do redis.call('PEXPIRE', key, RESULT_TTL_MS) end
end

local function memory_usage(key) return redis.call('MEMORY', 'USAGE', key, 'SAMPLES', 0) or 0 end

-- Returns the size of the files that responses with URLs make of an ended job's result, and the job's owner. The files
-- outlive the result, so the size is looked up; an older engine ends jobs without counting them.
local function file_bytes(id)
  local copies, owner = unpack(redis.call('HMGET', job_key(id), 'url_copies', 'owner'))
  local files = tonumber(string.match(redis.call('HGET', KEPT, id) or '', '^%d+ %d+ (%d+) ')) or 0
  if files == 0 and copies == '1' then files = memory_usage(result_key(id)) end
  return files, owner or ''
end

-- Returns until when a job counts that goes in `ttl_ms`: with files, no shorter than before.
local function counted_until(id, ttl_ms, files)
  local until_ms = now_ms() + ttl_ms
  return files > 0 and math.max(until_ms, tonumber(redis.call('ZSCORE', KEPT_UNTIL, id)) or 0) or until_ms
end

-- Counts what an ended job has left, for `ttl_ms`.
local function count_ended(id, ttl_ms, files, owner)
  local bytes = KEPT_BESIDE + files
  for _, key in ipairs({job_key(id), partials_key(id), result_key(id)}) do bytes = bytes + memory_usage(key) end
  count_kept(id, owner, bytes, 0, counted_until(id, ttl_ms, files), files)
end

-- Ends a job that the caller found live and readable. Its prompt is not kept: `ended_spec` takes the place of `spec`, and
-- without a result `ended_notes` that of `notes`.
local function finish(id, state, error)
  local job = job_key(id)
  redis.call('ZREM', WAITING, id)
  redis.call('SREM', RUNNING, id)
  redis.call('DEL', plans_key(id), sources_key(id))
  local has_partials = redis.call('PEXPIRE', partials_key(id), RESULT_TTL_MS) == 1
  local priority, stage, entry, owner, source_bytes, spec, notes, key, copies = unpack(redis.call('HMGET', job,
    'priority', 'stage', 'entry', 'owner', 'source_bytes', 'ended_spec', 'ended_notes', 'idempotency_key',
    'url_copies'))
  if owner and owner ~= '' then redis.call('SREM', owned_key(owner), id) end
  if source_bytes then redis.call('HINCRBY', COUNTERS, 'source_bytes', -source_bytes) end
  local queue = queue_key(priority, stage)
  redis.call('XACK', queue, GROUP, entry)
  redis.call('XDEL', queue, entry)
  local changed = {'state', state}
  local function change(name, value)
    table.insert(changed, name)
    table.insert(changed, value)
  end
  if spec then change('spec', spec) end
  if notes and notes ~= '' and state ~= 'succeeded' then change('notes', notes) end
  if error then change('error', error) end
  redis.call('HSET', job, unpack(changed))
  redis.call('HDEL', job, 'ended_spec', 'ended_notes')
  redis.call('PEXPIRE', job, RESULT_TTL_MS)
  if key then redis.call('PEXPIRE', idempotency_key(key), RESULT_TTL_MS) end
  local result = state == 'succeeded' and memory_usage(result_key(id)) or 0
  local files = copies == '1' and result or 0
  local partials = has_partials and memory_usage(partials_key(id)) or 0
  local bytes = KEPT_BESIDE + memory_usage(job) + partials + result + files
  count_kept(id, owner or '', bytes, 0, now_ms() + RESULT_TTL_MS, files)
  expire_kept()
  publish_state(id, state)
end

-- Makes a running job claimable at once, in its old place. The entry goes to a consumer that no engine has, so that
-- the consumer of a departed engine holds nothing and can be removed.
local function put_back(id, record)
  local job = job_key(id)
  redis.call('SREM', RUNNING, id)
  redis.call('XCLAIM', queue_of(record), GROUP, REQUEUED, 0, record.entry, 'TIME', 0, 'JUSTID')
  redis.call('HDEL', job, 'engine', 'progress')
  redis.call('HSET', job, 'state', 'queued')
  redis.call('ZADD', WAITING, redis.call('HGET', job, 'sequence'), id)
  publish_state(id, 'queued')
  wake_engines(id, record.stage)
end
