#!lua flags=allow-oom
-- drop takes a token, the tokens of a job, or the whole grant, out of service for
-- good, and keeps what it took to be revoked at the server.
--
-- arg: operation, token (id, or '' for all), job (that ends, or one slot of it; ''
-- for none; with a token it ends only if that is in service there), remember,
-- floor, age (ms since it was asked for; 0: now), and as 't:ID' the ids of tokens
-- that only the caller knows.
loadAll()
local mostOperations = 8
local jobs = (arg.job or '') ~= ''
local grants, age, ends = arg.token == '' and not jobs, tonumber(arg.age), now + tonumber(arg.remember)
-- What came after a drop that is late does not fall under it.
local g = age > 0 and math.max(now - age, tonumber(arg.floor)) + 1 or nextGeneration(arg.floor)

-- isOf tells whether a slot is of the job that ends, or the one that does.
local function isOf(slot) return slot == arg.job or jobOf(slot) == arg.job end

local function answer()
  prune()
  commit('drop')
  local out = {}
  each('w', function(id, value)
    local slot = string.match(value, '^%S+ %S+ %S+ (.*)$')
    if grants or id == arg.token or jobs and isOf(slot) then out['w:' .. id], out['x:' .. id] = value, H['x:' .. id] end
  end)
  return reply('OK', out)
end

-- revoke keeps a sealed value for the server to be told of. Its slot comes last
-- because it may be any text.
local function revoke(id, kind, slot, sealed)
  put('w:' .. id, table.concat({int(now), int(ends), kind, slot}, ' '))
  put('x:' .. id, sealed)
end

for field, value in pairs(arg) do
  local id = string.match(field, '^t:(.+)')
  if id then bury(id, now + tonumber(value)) end
end
if not grants and not jobs then bury(arg.token, ends) end
local operations = {arg.operation}
for operation in string.gmatch(H['do'] or '', '[^\n]+') do
  if operation == arg.operation then return answer() end
  if #operations < mostOperations then operations[#operations + 1] = operation end
end

local function endJob()
  local current = arg.token == ''
  each('s', function(slot, value)
    local s = isOf(slot) and token(slot)
    if s then
      current = current or s.id == arg.token
      ends = math.max(ends, s.ends + 10 * minute)
    end
  end)
  if not current then return end
  each('s', function(slot, value)
    local s = isOf(slot) and token(slot)
    if s then revoke(s.id, 'access', slot, H['a:' .. slot]) end
  end)
  conclude(arg.job, ends)
  putMax('g', g)
end

if jobs then
  endJob()
  put('do', table.concat(operations, '\n'))
  return answer()
end
put('do', table.concat(operations, '\n'))

each('s', function(slot, value)
  local s = register(value)
  if not s or grants and s.g > g or not grants and (s.id ~= arg.token or s.state == '-') then return end
  if s.state == '+' then
    bury(s.id, math.max(ends, s.ends + 10 * minute))
    revoke(s.id, 'access', slot, H['a:' .. slot])
  end
  if grants then
    put('s:' .. slot, nil)
    put('a:' .. slot, nil)
  else
    s.g, s.state, s.ends = math.max(g, s.g + 1), '-', math.max(ends, s.ends)
    putMax('g', s.g)
    putSlot(slot, s, nil)
  end
end)
if grants then
  local c, l, e = grant(H.r), lease(), failure()
  if c and c.g <= g then
    if c.state == '+' then
      bury(c.id, ends)
      bury(c.origin, ends)
      revoke(c.id, 'refresh', '', H.rt)
    end
    put('r', nil)
    put('rt', nil)
    put('p', nil)
  end
  if l and l.fence <= g then put('l', nil) end
  if e and e.fence <= g then takeFailure() end
  putMax('ff', g)
  putMax('d', g)
  putMax('g', g)
  putMax('f', g)
end
keep(ends)
return answer()
