-- Cancels a job and deletes its result. An unknown job is marked, because its submit may still be in flight.
--
-- args: id
-- returns: 1 if this call ended the job, else 0

local id = args.id
local record = read_record(id)
if record == nil then
  redis.call('SET', withdrawn_key(id), 1, 'PX', RESULT_TTL_MS)
  return 0
end
local files, owner = 0, ''
if record then files, owner = file_bytes(id) end
redis.call('DEL', result_key(id), partials_key(id))
if record == false then
  fail_unreadable(id)
  return 0
end
if is_live(record.state) then
  finish(id, 'cancelled')
  return 1
end
count_ended(id, redis.call('PTTL', job_key(id)), files, owner)
return 0
