-- Stores how far a job is.
--
-- args: id, epoch
-- blobs: progress
-- returns: 1, or 0 if the claim is lost

local id, progress = args.id, ARGV[2]
if not holds(id, args.epoch) then return 0 end
redis.call('HSET', job_key(id), 'progress', progress)
redis.call('PUBLISH', PREFIX .. ':events', '{"job":' .. cjson.encode(id) .. ',"progress":' .. progress .. '}')
return 1
