-- Reading records that may be damaged, and what a record says about its runs. Put behind prelude.lua.
--
-- A claim is a run from its first renewal on: `confirmed` is the epoch of the last claim that was renewed, `runs` counts
-- them. A confirmed claim that its engine did not end is a death, field `death:{epoch}`: {engine, alone, phase, step,
-- steps}, with the last progress; `dead` stands for `engine` where its end is certain. `alone` in the record is the epoch
-- of the last claim as the only job of an engine.

local UNREADABLE = '{"message":"The stored job cannot be read.","type":"server_error","code":"job_unreadable",'
  .. '"param":null}'
local STATES = {queued = 1, running = 1, succeeded = 0, failed = 0, cancelled = 0, expired = 0}
local STRINGS = {'state', 'priority', 'entry', 'engine', 'api', 'progress'}
local NUMBERS = {'sequence', 'images', 'kv_tokens', 'submitted_at', 'deadline', 'epoch', 'runs'}
local OPTIONAL_NUMBERS = {'source_tokens', 'source_bytes', 'url_copies', 'work', 'format', 'confirmed', 'alone', 'absolved'}
local MAX_ABSOLVED = 3
local all_fields = {} -- filled when first used: most submits read no record

local function is_entry(text)
  local time, number = string.match(text or '', '^(%d+)%-(%d+)$')
  return time and #time <= 15 and #number <= 15
end

local function are_numbers(record, names, optional)
  for _, name in ipairs(names) do
    local text = record[name]
    local value = integer(text)
    if text and (not value or value < 0 and name ~= 'runs') or not text and not optional then return false end
    record[name] = value
  end
  return true
end

-- Returns the record, with numbers as such; nil if there is none; false if it cannot be read.
local function read_record(id)
  for _, names in ipairs(#all_fields == 0 and {STRINGS, NUMBERS, OPTIONAL_NUMBERS} or {}) do
    for _, name in ipairs(names) do table.insert(all_fields, name) end
  end
  local values = redis.pcall('HMGET', job_key(id), unpack(all_fields))
  if values.err then return false end
  local record, found = {}, false
  for i, name in ipairs(all_fields) do
    record[name] = values[i] or nil
    found = found or values[i]
  end
  if not found then
    if redis.call('EXISTS', job_key(id)) == 1 then return false end
    return nil
  end
  if STATES[record.state] == 0 then return record end
  if not STATES[record.state] or not is_entry(record.entry) then return false end
  if record.priority ~= 'interactive' and record.priority ~= 'batch' then return false end
  return are_numbers(record, NUMBERS) and are_numbers(record, OPTIONAL_NUMBERS, true) and record
end

-- Ends a job whose record cannot be read, after repairing what `finish` reads. The first write cannot be refused.
local function fail_unreadable(id, priority, entry)
  redis.call('ZREM', WAITING, id)
  local job = job_key(id)
  if redis.call('TYPE', job)['ok'] ~= 'hash' then redis.call('DEL', job) end
  local stored_priority, stored_entry, source_bytes = unpack(
    redis.call('HMGET', job, 'priority', 'entry', 'source_bytes'))
  if stored_priority == 'interactive' or stored_priority == 'batch' then priority = priority or stored_priority end
  if is_entry(stored_entry) then entry = entry or stored_entry end
  if source_bytes and (integer(source_bytes) or -1) < 0 then redis.call('HDEL', job, 'source_bytes') end
  redis.call('HSET', job, 'priority', priority or 'interactive', 'entry', entry or '0-0')
  finish(id, 'failed', UNREADABLE)
end

-- Returns the record of a claim that holds, else nil. Ends a job that cannot be read.
local function held_record(id, epoch)
  local record = read_record(id)
  if record == false then fail_unreadable(id) end
  return record and record.state == 'running' and record.epoch == epoch and record or nil
end

-- Returns a number that JSON can hold, 0 for anything else.
local function finite(value)
  local number = tonumber(value)
  return number and math.abs(number) < 1e15 and number or 0
end

-- Returns the death that the end of a running job's claim without its engine is, or nil.
local function death_of(record)
  if record.state ~= 'running' or record.confirmed ~= record.epoch then return nil end
  local readable, progress = pcall(cjson.decode, record.progress or '{}')
  if not readable or type(progress) ~= 'table' then progress = {} end
  local phase = type(progress.phase) == 'string' and progress.phase or ''
  return {engine = record.engine, alone = record.alone == record.epoch, phase = phase,
    step = finite(progress.step), steps = finite(progress.steps)}
end

local function store_death(id, epoch, death)
  redis.call('HSET', job_key(id), 'death:' .. string.format('%d', epoch), cjson.encode(death))
end

local function deaths_in(id, record)
  local deaths = {}
  if record.runs == 0 then return deaths end
  for _, name in ipairs(redis.call('HKEYS', job_key(id))) do
    if string.sub(name, 1, 6) == 'death:' then
      local readable, death = pcall(cjson.decode, redis.call('HGET', job_key(id), name))
      death = readable and type(death) == 'table' and death or {}
      table.insert(deaths, {alone = death.alone == true, certain = death.dead ~= nil, phase = tostring(death.phase),
        step = finite(death.step), steps = finite(death.steps)})
    end
  end
  return deaths
end

-- Takes a death back: the engine of that claim lives, and has only lost its lease. MAX_ABSOLVED times in a job's life, or
-- one that freezes its engines would go on for ever.
local function absolve(id, record, epoch, consumer)
  local name, absolved = 'death:' .. string.format('%d', epoch), record.absolved or 0
  local readable, death = pcall(cjson.decode, redis.call('HGET', job_key(id), name) or '')
  if not readable or type(death) ~= 'table' or death.engine ~= consumer or absolved >= MAX_ABSOLVED then return end
  redis.call('HDEL', job_key(id), name)
  redis.call('HSET', job_key(id), 'runs', record.runs - 1, 'absolved', absolved + 1)
end

-- A job whose client waits at an API process names it in `api`. It is an orphan when that API was not seen for
-- ORPHAN_MS, unless others could not be seen either: after an outage of Redis, or a step of its clock, `heard` says
-- since when heartbeats arrive without a gap of GAP_MS.
local APIS, HEARD = PREFIX .. ':apis', PREFIX .. ':heard'
local ORPHAN_MS, GAP_MS, FORGET_MS = args.orphan_ms, 10000, 3600000

local function hear(now)
  local at = tonumber(redis.call('HGET', HEARD, 'at'))
  redis.call('HSET', HEARD, 'at', now)
  if not at or now - at > GAP_MS or now < at then redis.call('HSET', HEARD, 'since', now) end
  redis.call('PEXPIRE', HEARD, FORGET_MS)
end

local function is_orphan(record, now)
  if not record.api or not ORPHAN_MS then return false end
  local seen = tonumber(redis.call('ZSCORE', APIS, record.api)) or 0
  if now - math.max(seen, record.submitted_at) < ORPHAN_MS then return false end
  local at, since = unpack(redis.call('HMGET', HEARD, 'at', 'since'))
  return now - (tonumber(at) or 0) <= GAP_MS and now - (tonumber(since) or now) >= ORPHAN_MS
end
