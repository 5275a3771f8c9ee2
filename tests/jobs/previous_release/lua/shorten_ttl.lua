-- Keeps what an ended job left for another `ttl_ms` only.
--
-- args: id, ttl_ms
-- returns: 1 if the job has ended, else 0

local id = args.id
local record = read_record(id)
if not record or is_live(record.state) then return 0 end
for _, key in ipairs({job_key(id), result_key(id), partials_key(id)}) do redis.call('PEXPIRE', key, args.ttl_ms) end
local files, owner = 0, ''
if record.url_copies then files, owner = file_bytes(id) end
local until_ms = counted_until(id, args.ttl_ms, files)
if files > 0 then
  count_kept(id, owner, KEPT_BESIDE + files, 0, until_ms, files)
  expire_kept()
else
  redis.call('ZADD', KEPT_UNTIL, 'XX', until_ms, id)
end
return 1
