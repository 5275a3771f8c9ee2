-- Lists the engines that have a heartbeat. Removes the others from the index and their consumers from the groups, as
-- soon as they hold no job that another engine has not taken over.
--
-- args: field, of `engine:{id}`
-- returns: [id, value of the field, ...] in order of the ids

local live = {}

local function holds_jobs(id)
  for _, priority in ipairs({'interactive', 'batch'}) do
    -- pcall: a missing group or a lack of memory must not hide the engines.
    local queue = queue_key(priority)
    if #redis.pcall('XPENDING', queue, GROUP, '-', '+', 1, id) > 0 then return true end
    redis.pcall('XGROUP', 'DELCONSUMER', queue, GROUP, id)
  end
  return false
end

local ids = redis.call('SMEMBERS', PREFIX .. ':engines')
table.sort(ids)
for _, id in ipairs(ids) do
  local value = redis.call('HGET', PREFIX .. ':engine:' .. id, args.field)
  if value then
    table.insert(live, id)
    table.insert(live, value)
  elseif not holds_jobs(id) then
    redis.call('SREM', PREFIX .. ':engines', id)
  end
end
return live
