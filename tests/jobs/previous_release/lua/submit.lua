-- Queues a job. An idempotency key leads a repeated request to the job of the first, unless that one ended without a
-- result. What jobs may need in Redis is limited in all, and for an owner to the `owner_parts`-th part.
--
-- args: id, priority, images, kv_tokens, source_tokens, work, timeout_ms, owner, idempotency_key, fingerprint,
--   max_queue, max_owned?, source_bytes, max_source_bytes?, result_bytes, max_result_bytes?, max_kept_bytes? (both),
--   owner_parts?, url_copies? (of the result), dry_run?, format? (absent: 1), api?
-- blobs: spec, notes, origin, ended_spec, ended_notes, then the fields of `sources:{id}`: name, value, name, value, ...
-- returns: ['accepted', now, jobs that wait before it] | 'accepted' (dry run) | 'known' (or discarded) |
--   'attached {id}' | 'full' | 'full of sources' | 'full of results' | 'too much', 'too many' (of this owner) |
--   'reused' (the key, by another request)

local id, key, fingerprint, owner = args.id, args.idempotency_key, args.fingerprint, args.owner
local spec, notes, origin, ended_spec, ended_notes = unpack(ARGV, 2, 6)
local job, job_of_key = job_key(id), idempotency_key(key)
local SLACK_MS, LOOKED_AT = 60000, 8 -- a job that is followed ends at its deadline

-- Looks at jobs whose data should be gone. Ends those that nothing has ended, such as the jobs of an API that died.
local function look_again(now)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEPT_UNTIL, '-inf', now, 'LIMIT', 0, LOOKED_AT)) do
    local record, ttl = read_record(id), redis.call('PTTL', job_key(id))
    count_kept(id, '', 0, 0)
    if record == false then
      fail_unreadable(id)
    elseif record and is_live(record.state) then
      finish(id, 'expired')
    elseif ttl > 0 then
      count_ended(id, ttl, file_bytes(id))
    end
  end
end

-- Where little is kept, any job fits: otherwise a large one would be refused for ever.
local function over(held, new, limit, little) return limit and held > (little or limit / 16) and held + new > limit end

if redis.call('EXISTS', job, withdrawn_key(id)) > 0 then return 'known' end
if key ~= '' then
  local first, known = string.match(redis.call('GET', job_of_key) or '', '^(%S+) (%S+)$')
  if first and first ~= fingerprint then return 'reused' end
  local state = known and redis.pcall('HGET', job_key(known), 'state')
  if is_live(state) or state == 'succeeded' and redis.call('EXISTS', result_key(known)) == 1 then
    return 'attached ' .. known
  end
end
local now = now_ms()
look_again(now)
local waiting = redis.call('ZCARD', WAITING)
if waiting >= args.max_queue then return 'full' end
local has_sources, results, source_bytes = #ARGV > 6, args.result_bytes, args.source_bytes
local max_sources, max_results, max_kept = args.max_source_bytes, args.max_result_bytes, args.max_kept_bytes
local kept, owned, owned_sources = unpack(
  redis.call('HMGET', KEPT_TOTAL, 'bytes', 'bytes:' .. owner, 'sources:' .. owner))
kept, owned, owned_sources = tonumber(kept or 0), tonumber(owned or 0), tonumber(owned_sources or 0)
if args.owner_parts and owner ~= '' then
  local function part(limit) return limit and limit / args.owner_parts end
  if has_sources and over(owned_sources, source_bytes, part(max_sources), 0)
    or over(owned, results, part(max_results))
    or over(owned + owned_sources, results + source_bytes, part(max_kept)) then return 'too much' end
end
local kept_sources = tonumber(redis.call('HGET', COUNTERS, 'source_bytes') or 0)
if has_sources and over(kept_sources, source_bytes, max_sources, 0) then return 'full of sources' end
if over(kept, results, max_results) or over(kept + kept_sources, results + source_bytes, max_kept) then
  return 'full of results'
end
if args.max_owned and redis.call('SCARD', owned_key(owner)) >= args.max_owned then return 'too many' end
if args.dry_run then return 'accepted' end
local sequence = redis.call('HINCRBY', COUNTERS, 'submitted', 1)
local entry = redis.call('XADD', queue_key(args.priority), '*', 'job', id)
redis.call('HSET', job, 'state', 'queued', 'priority', args.priority, 'spec', spec, 'sequence', sequence,
  'entry', entry, 'images', args.images, 'kv_tokens', args.kv_tokens, 'source_tokens', args.source_tokens,
  'work', args.work, 'submitted_at', now, 'deadline', now + args.timeout_ms, 'epoch', 0, 'runs', 0, 'owner', owner,
  'notes', notes, 'origin', origin, 'ended_spec', ended_spec, 'ended_notes', ended_notes)
if args.format then redis.call('HSET', job, 'format', args.format) end
if args.api then redis.call('HSET', job, 'api', args.api) end
if args.url_copies then redis.call('HSET', job, 'url_copies', args.url_copies) end
if has_sources then
  redis.call('HSET', sources_key(id), unpack(ARGV, 7))
  redis.call('HSET', job, 'source_bytes', source_bytes)
  redis.call('HINCRBY', COUNTERS, 'source_bytes', source_bytes)
end
if waiting == 0 and redis.call('SCARD', RUNNING) == 0 then -- see expire_kept
  for _, name in ipairs({KEPT, KEPT_UNTIL, KEPT_TOTAL}) do redis.call('PERSIST', name) end
end
count_kept(id, owner, KEPT_BESIDE + results, source_bytes, now + args.timeout_ms + SLACK_MS, 0, true)
if owner ~= '' then redis.call('SADD', owned_key(owner), id) end
if key ~= '' then
  redis.call('SET', job_of_key, fingerprint .. ' ' .. id, 'PX', args.timeout_ms + RESULT_TTL_MS)
  redis.call('HSET', job, 'idempotency_key', key)
end
redis.call('ZADD', WAITING, sequence, id)
wake_engines(id)
return {'accepted', now, waiting}
