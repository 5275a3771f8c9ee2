-- Moves a planned job to the render queue. This run does not count, since it ended well; deaths and earlier runs stay.
--
-- args: consumer, id, epoch
-- blobs: fields of `plans:{id}`: name, value, name, value, ...
-- returns: 1, or 0 if the claim is lost, another consumer's, or one of the render queue

local id, FIRST_SEQUENCE = args.id, 1e12 -- beyond those of `XADD *`, see the invariants
local record = held_record(id, args.epoch)
if not record or record.engine ~= args.consumer or record.stage then return 0 end

-- Returns an id after the last one of the stream.
local function next_entry(queue)
  local last
  local info = redis.call('XINFO', 'STREAM', queue)
  for i = 1, #info, 2 do last = info[i] == 'last-generated-id' and info[i + 1] or last end
  local time, sequence = string.match(last, '^(%d+)-(%d+)$')
  local now = now_ms()
  if tonumber(time) < now then return string.format('%.0f-%.0f', now, FIRST_SEQUENCE) end
  return string.format('%s-%.0f', time, sequence + 1)
end

redis.call('HSET', plans_key(id), unpack(ARGV, 2))
local job, queue = job_key(id), queue_key(record.priority, 'render')
last_delivered(queue)
local entry = next_entry(queue)
redis.call('XADD', queue, entry, 'job', id)
redis.call('XACK', queue_of(record), GROUP, record.entry)
redis.call('XDEL', queue_of(record), record.entry)
redis.call('SREM', RUNNING, id)
redis.call('HDEL', job, 'engine', 'progress')
redis.call('HSET', job, 'state', 'queued', 'stage', 'render', 'entry', entry)
if record.confirmed == record.epoch then redis.call('HINCRBY', job, 'runs', -1) end
redis.call('ZADD', WAITING, record.sequence, id)
publish_state(id, 'queued')
wake_engines(id, 'render')
return 1
