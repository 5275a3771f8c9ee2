-- Puts back every job of a dead engine and removes its consumer. A death that the jobs may have caused is stored in
-- them, and a renewal that arrives late does not take it back; without blame their runs leave no trace, also those whose
-- leases have lapsed. An end by a process that does not know of stages leaves an entry, which is deleted.
--
-- args: consumer, blame
-- returns: how many jobs it held

local consumer, jobs = args.consumer, 0

local function surrender(id, record)
  local death = death_of(record)
  put_back(id, record)
  if death and args.blame then
    death.dead, death.engine = death.engine, nil
    store_death(id, record.epoch, death)
  elseif death then
    redis.call('HINCRBY', job_key(id), 'runs', -1)
  end
  jobs = jobs + 1
end

-- Takes back the deaths of lapsed claims, whoever has the jobs now.
local function forgive_lapses()
  for _, member in ipairs(redis.call('SMEMBERS', lapsed_key(consumer))) do
    local epoch, id = string.match(member, '^(%d+) (.*)$')
    local record = id and read_record(id)
    if record and is_live(record.state) and redis.call('HDEL', job_key(id), 'death:' .. epoch) == 1 then
      redis.call('HINCRBY', job_key(id), 'runs', -1)
    end
  end
  redis.call('DEL', lapsed_key(consumer))
end

if not args.blame then forgive_lapses() end
for _, queue in ipairs(all_queues()) do
  last_delivered(queue)
  for _, pending in ipairs(redis.call('XPENDING', queue, GROUP, '-', '+', 10000, consumer)) do
    local entry = redis.call('XRANGE', queue, pending[1], pending[1])[1]
    local id = entry and entry[2][2]
    local record = id and read_record(id)
    if record and is_live(record.state) and record.entry == pending[1] then
      surrender(id, record)
    elseif id and record == false then
      fail_unreadable(id, queue, pending[1])
    else
      redis.call('XACK', queue, GROUP, pending[1])
      redis.call('XDEL', queue, pending[1])
    end
  end
  redis.call('XGROUP', 'DELCONSUMER', queue, GROUP, consumer)
end
return jobs
