#!lua flags=allow-oom
-- drop takes a token, or the whole grant, out of service for good, and keeps
-- what it took to be revoked at the server.
--
-- arg: operation, token (id, or '' for the grant), remember, floor, age (ms since
-- it was asked for; 0: now), and as 't:ID' the ids of tokens that only the
-- caller knows.
loadAll()
local mostOperations = 8
local grants, age, ends = arg.token == '', tonumber(arg.age), now + tonumber(arg.remember)
-- What came after a drop that is late does not fall under it.
local g = age > 0 and math.max(now - age, tonumber(arg.floor)) + 1 or nextGeneration(arg.floor)

local function answer()
  prune()
  commit('drop')
  local out = {}
  each('w', function(id, value)
    if grants or id == arg.token then out['w:' .. id], out['x:' .. id] = value, H['x:' .. id] end
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
if not grants then bury(arg.token, ends) end
local operations = {arg.operation}
for operation in string.gmatch(H['do'] or '', '[^\n]+') do
  if operation == arg.operation then return answer() end
  if #operations < mostOperations then operations[#operations + 1] = operation end
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
