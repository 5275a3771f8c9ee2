-- Cancels a job and deletes its result. An unknown job is marked, because its submit may still be in flight.
--
-- args: id
-- returns: 1 if this call ended the job, else 0

local id = args.id
local state = redis.call('HGET', job_key(id), 'state')
if not state then
  redis.call('SET', withdrawn_key(id), 1, 'PX', RESULT_TTL_MS)
  return 0
end
redis.call('DEL', result_key(id), partials_key(id))
if not is_live(state) then return 0 end
finish(id, 'cancelled')
return 1
