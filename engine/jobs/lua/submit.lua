-- Queues a job. An idempotency key leads a repeated request to the job of the first, unless that one ended without a
-- result. However large the source images are, they fit where there are no others.
--
-- args: id, priority, images, kv_tokens, source_tokens, work, timeout_ms, owner, idempotency_key, fingerprint,
--   max_queue, max_owned?, source_bytes, max_source_bytes?, dry_run?, format? (absent: 1),
--   api?
-- blobs: spec, notes, origin, ended_spec, ended_notes, then the fields of `sources:{id}`: name, value, name, value, ...
-- returns: 'accepted' | 'known' (or discarded) | 'attached {id}' | 'full' | 'full of sources' | 'too many' (of this
--   owner) | 'reused' (the key, by another request)

local id, key, fingerprint, owner = args.id, args.idempotency_key, args.fingerprint, args.owner
local spec, notes, origin, ended_spec, ended_notes = unpack(ARGV, 2, 6)
local job, job_of_key = job_key(id), PREFIX .. ':idempotency:' .. key
if redis.call('EXISTS', job, withdrawn_key(id)) > 0 then return 'known' end
if key ~= '' then
  local first, known = string.match(redis.call('GET', job_of_key) or '', '^(%S+) (%S+)$')
  if first and first ~= fingerprint then return 'reused' end
  local state = known and redis.call('HGET', job_key(known), 'state')
  if is_live(state) or state == 'succeeded' and redis.call('EXISTS', result_key(known)) == 1 then
    return 'attached ' .. known
  end
end
if redis.call('ZCARD', WAITING) >= args.max_queue then return 'full' end
local has_sources = #ARGV > 6
if has_sources and args.max_source_bytes then
  local held = tonumber(redis.call('HGET', COUNTERS, 'source_bytes') or 0)
  if held > 0 and held + args.source_bytes > args.max_source_bytes then return 'full of sources' end
end
if args.max_owned and redis.call('SCARD', owned_key(owner)) >= args.max_owned then return 'too many' end
if args.dry_run then return 'accepted' end
local now = now_ms()
local sequence = redis.call('HINCRBY', COUNTERS, 'submitted', 1)
local entry = redis.call('XADD', queue_key(args.priority), '*', 'job', id)
redis.call('HSET', job, 'state', 'queued', 'priority', args.priority, 'spec', spec, 'sequence', sequence,
  'entry', entry, 'images', args.images, 'kv_tokens', args.kv_tokens, 'source_tokens', args.source_tokens,
  'work', args.work, 'submitted_at', now, 'deadline', now + args.timeout_ms, 'epoch', 0, 'runs', 0, 'owner', owner,
  'notes', notes, 'origin', origin, 'ended_spec', ended_spec, 'ended_notes', ended_notes)
if args.format then redis.call('HSET', job, 'format', args.format) end
if args.api then redis.call('HSET', job, 'api', args.api) end
if has_sources then
  redis.call('HSET', sources_key(id), unpack(ARGV, 7))
  redis.call('HSET', job, 'source_bytes', args.source_bytes)
  redis.call('HINCRBY', COUNTERS, 'source_bytes', args.source_bytes)
end
if owner ~= '' then redis.call('SADD', owned_key(owner), id) end
if key ~= '' then redis.call('SET', job_of_key, fingerprint .. ' ' .. id, 'PX', args.timeout_ms + RESULT_TTL_MS) end
redis.call('ZADD', WAITING, sequence, id)
wake_engines(id)
return 'accepted'
