-- Keeps what an ended job left for another `ttl_ms` only.
--
-- args: id, ttl_ms
-- returns: 1 if the job has ended, else 0

local id = args.id
local state = redis.call('HGET', job_key(id), 'state')
if not state or is_live(state) then return 0 end
redis.call('PEXPIRE', job_key(id), args.ttl_ms)
redis.call('PEXPIRE', result_key(id), args.ttl_ms)
redis.call('PEXPIRE', partials_key(id), args.ttl_ms)
local files, owner = file_bytes(id)
if files > 0 then
  count_kept(id, owner, KEPT_BESIDE + files, 0, now_ms() + RESULT_TTL_MS)
  expire_kept()
else
  count_ended(id, args.ttl_ms, 0, owner)
end
return 1
