-- Puts back every job of a dead engine and removes its consumer. The runs count if the jobs may be to blame for its
-- death.
--
-- args: consumer, blame
-- returns: how many jobs it held

local consumer, jobs = args.consumer, 0
for _, priority in ipairs({'interactive', 'batch'}) do
  local queue = queue_key(priority)
  last_delivered(queue)
  for _, pending in ipairs(redis.call('XPENDING', queue, GROUP, '-', '+', 10000, consumer)) do
    local entry = redis.call('XRANGE', queue, pending[1], pending[1])[1]
    local id = entry and entry[2][2]
    if id and redis.call('HGET', job_key(id), 'entry') == pending[1] then
      put_back(id, queue, pending[1])
      if not args.blame then redis.call('HINCRBY', job_key(id), 'runs', -1) end
      jobs = jobs + 1
    else
      redis.call('XACK', queue, GROUP, pending[1])
      redis.call('XDEL', queue, pending[1])
    end
  end
  redis.call('XGROUP', 'DELCONSUMER', queue, GROUP, consumer)
end
return jobs
