"""What the API asks of Redis; see `engine.jobs.scripts` for the keys."""

from engine.jobs.scripts import PRELUDE

# An idempotency key leads a repeated request to the job of the first, unless that one ended without a result. ARGV goes
# on with the fields of `sources:{id}`: name, value, name, value, ... However large, they find room where there are no
# others.
#
# -> 'accepted' | 'known' (or withdrawn) | 'full' | 'full of sources' | 'too many' (of this owner)
#    | 'reused' (the key, by another request) | 'attached {id}'
SUBMIT = (
    PRELUDE
    + """
local id, priority, spec, images, kv_tokens, source_tokens, timeout_ms, max_queue, owner, max_owned, notes, key,
  fingerprint, origin, source_bytes, max_source_bytes = unpack(ARGV, 3, 18)
local job, key_of_key = job_key(id), PREFIX .. ':idempotency:' .. key
if redis.call('EXISTS', job, withdrawn_key(id)) > 0 then return 'known' end
if key ~= '' then
  local first, known = string.match(redis.call('GET', key_of_key) or '', '^(%S+) (%S+)$')
  if first and first ~= fingerprint then return 'reused' end
  local state = known and redis.call('HGET', job_key(known), 'state')
  if is_live(state) or state == 'succeeded' and redis.call('EXISTS', result_key(known)) == 1 then
    return 'attached ' .. known
  end
end
if redis.call('ZCARD', WAITING) >= tonumber(max_queue) then return 'full' end
local has_sources = #ARGV > 18
if has_sources and max_source_bytes ~= '' then
  local held = tonumber(redis.call('HGET', COUNTERS, 'source_bytes') or 0)
  if held > 0 and held + tonumber(source_bytes) > tonumber(max_source_bytes) then return 'full of sources' end
end
if max_owned ~= '' and redis.call('SCARD', owned_key(owner)) >= tonumber(max_owned) then return 'too many' end
local now = now_ms()
local sequence = redis.call('HINCRBY', COUNTERS, 'submitted', 1)
local entry = redis.call('XADD', queue_key(priority), '*', 'job', id)
redis.call('HSET', job, 'state', 'queued', 'priority', priority, 'spec', spec, 'sequence', sequence, 'entry', entry,
  'images', images, 'kv_tokens', kv_tokens, 'source_tokens', source_tokens, 'submitted_at', now,
  'deadline', now + timeout_ms, 'epoch', 0, 'runs', 0, 'owner', owner, 'notes', notes,
  'origin', origin)
if has_sources then
  redis.call('HSET', sources_key(id), unpack(ARGV, 19))
  redis.call('HSET', job, 'source_bytes', source_bytes)
  redis.call('HINCRBY', COUNTERS, 'source_bytes', source_bytes)
end
if owner ~= '' then redis.call('SADD', owned_key(owner), id) end
if key ~= '' then redis.call('SET', key_of_key, fingerprint .. ' ' .. id, 'PX', timeout_ms + RESULT_TTL_MS) end
redis.call('ZADD', WAITING, sequence, id)
wake(id)
return 'accepted'
"""
)

# state is 'cancelled', or 'expired', which holds only from the deadline on. -> 1 if this call ended the job
END = (
    PRELUDE
    + """
local id, state = unpack(ARGV, 3)
local current, deadline = unpack(redis.call('HMGET', job_key(id), 'state', 'deadline'))
if not is_live(current) then return 0 end
if state == 'expired' and now_ms() < tonumber(deadline) then return 0 end
finish(id, state)
return 1
"""
)

# ARGV goes on with ids. Those whose deadline has passed end here. -> [id, state, ...] of those that have ended, with an
# empty state where the job is not known
ENDED = (
    PRELUDE
    + """
local now, ended = now_ms(), {}
for i = 3, #ARGV do
  local id = ARGV[i]
  local state, deadline = unpack(redis.call('HMGET', job_key(id), 'state', 'deadline'))
  if is_live(state) and now >= tonumber(deadline) then
    finish(id, 'expired')
    state = 'expired'
  end
  if not is_live(state) then
    table.insert(ended, id)
    table.insert(ended, state or '')
  end
end
return ended
"""
)

# A submit that its sender gave up may still be on its way to us, so an unknown job is marked. -> 1 as for END
WITHDRAW = (
    PRELUDE
    + """
local id = ARGV[3]
local state = redis.call('HGET', job_key(id), 'state')
if not state then
  redis.call('SET', withdrawn_key(id), 1, 'PX', RESULT_TTL_MS)
  return 0
end
redis.call('DEL', result_key(id), partials_key(id))
if not is_live(state) then return 0 end
finish(id, 'cancelled')
return 1
"""
)

# -> 1 if the job has ended and goes in `left_ms`
DELIVERED = (
    PRELUDE
    + """
local id, left_ms = unpack(ARGV, 3)
local state = redis.call('HGET', job_key(id), 'state')
if not state or is_live(state) then return 0 end
redis.call('PEXPIRE', job_key(id), left_ms)
redis.call('PEXPIRE', result_key(id), left_ms)
redis.call('PEXPIRE', partials_key(id), left_ms)
return 1
"""
)

# -> [waiting, running, source bytes, given up]
STATS = (
    PRELUDE
    + """
return {
  redis.call('ZCARD', WAITING), redis.call('SCARD', RUNNING),
  tonumber(redis.call('HGET', COUNTERS, 'source_bytes') or 0), tonumber(redis.call('HGET', COUNTERS, 'given_up') or 0)}
"""
)

# -> [id, value of the field, ...] of the live engines, in order of their ids; forgets the others, their names in the
# groups included, as soon as they hold no job that has not been taken over
ENGINES = (
    PRELUDE
    + """
local field, live = ARGV[3], {}

local function holds_jobs(id)
  for _, priority in ipairs({'interactive', 'batch'}) do
    -- An error is the lack of a group, or of memory: this must not keep anybody from seeing the engines.
    local queue = queue_key(priority)
    if #redis.pcall('XPENDING', queue, GROUP, '-', '+', 1, id) > 0 then return true end
    redis.pcall('XGROUP', 'DELCONSUMER', queue, GROUP, id)
  end
  return false
end

local ids = redis.call('SMEMBERS', PREFIX .. ':engines')
table.sort(ids)
for _, id in ipairs(ids) do
  local value = redis.call('HGET', PREFIX .. ':engine:' .. id, field)
  if value then
    table.insert(live, id)
    table.insert(live, value)
  elseif not holds_jobs(id) then
    redis.call('SREM', PREFIX .. ':engines', id)
  end
end
return live
"""
)
